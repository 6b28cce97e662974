from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.frontend.stops import StopScanner

LETTERS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first end of any stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(st.lists(LETTERS, max_size=8), STOPS)
def test_any_cut_of_the_text_gives_the_same(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    given_out = ""
    for piece in pieces:
        given_out += scanner.push(piece)
        if scanner.hit:
            break
    else:
        given_out += scanner.flush()
    assert (given_out, scanner.hit) == reference("".join(pieces), stops)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    scanner = StopScanner(["END!", "\n\n"])
    assert scanner.push("the EN") == "the "
    assert scanner.push("glish\n") == "ENglish"
    assert scanner.push("x") == "\nx"
    assert scanner.push("E") == ""
    assert scanner.flush() == "E"
