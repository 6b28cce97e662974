"""The figures of the paper on tiny traces: every row is there, absent traces are said to be absent, deviations are right."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from mooncake.cli import main
from mooncake.core.errors import ConfigError
from mooncake.plan import fast25_published as published
from mooncake.plan.fast25 import figure_names, render, reproduce, reproduction_text
from mooncake.plan.fast25_figures import FIGURES
from mooncake.plan.fast25_lab import ABSENT, RUN, Lab, Row, row
from mooncake.plan.fast25_parameters import PARAMETERS, Parameters, assumptions
from tests.plan.traces import write_trace

TINY = Parameters(
    num_nodes=4,
    prefill=2,
    fig1_speeds=(2.0,),
    fig5_speeds=(1.0, 2.0),
    fig10_prefill=2,
    fig13_gbps=(1.0, 800.0),
    fig15_prefill=(1, 2),
)


def lab(folder: Path, *traces: str) -> tuple[Lab, list[str]]:
    for name in traces:
        write_trace(folder / published.TRACE_FILES[name], 12)
    said: list[str] = []
    return Lab(folder, TINY, None, said.append), said


def rows_of(found: Lab, figure: str) -> dict[str, Row]:
    rows = list(FIGURES[figure](found))
    assert all(each.figure == figure for each in rows)
    by_name = {each.row: each for each in rows}
    assert len(by_name) == len(rows), "two rows of one name"
    return by_name


@pytest.mark.parametrize("figure", FIGURES)
def test_without_traces_all_rows_are_absent(tmp_path: Path, figure: str) -> None:
    found, said = lab(tmp_path)
    rows = rows_of(found, figure)
    assert rows
    assert all(each.simulated is None and each.deviation is None and each.status == ABSENT for each in rows.values())
    assert said == []


@pytest.mark.parametrize("figure", FIGURES)
def test_with_traces_all_rows_are_run(tmp_path: Path, figure: str) -> None:
    found, _ = lab(tmp_path, *published.TRACE_FILES)
    rows = rows_of(found, figure)
    assert all(each.status == RUN for each in rows.values())
    assert all(each.simulated is not None for each in rows.values() if "swing" not in each.note)


def test_a_run_is_made_once_for_all_figures(tmp_path: Path) -> None:
    found, said = lab(tmp_path, "conversation")
    for figure in ("fig1", "fig5", "fig7", "fig8"):
        rows_of(found, figure)
    assert len(said) == found.num_runs == len(set(said))
    # algorithm1, joint; three of vLLM, two behind the strong router; three policies of figure 5. At twice the load algorithm1
    # and three of vLLM for figure 1, three other policies for figure 5.
    assert found.num_runs == 2 + 3 + 2 + 3 + 4 + 3


def test_figure_9_by_hand(tmp_path: Path) -> None:
    """Twelve prompts of three blocks: the first is everybody's, the second is one of four, the third nobody else's."""
    found, _ = lab(tmp_path, "synthetic")
    rows = rows_of(found, "fig9")
    # The first block is reused 11 times, the second 8 times; 512 tokens each, of 12 prompts of 1,500.
    assert rows["synthetic: maximum"].simulated == pytest.approx(19 * 512 / 18_000, abs=1e-6)
    assert rows["synthetic: 3 M tokens, share of the maximum"].simulated == 1.0
    assert rows["synthetic: 3 M tokens, share of the maximum"].deviation == pytest.approx(1 / 0.46 - 1, abs=1e-4)
    assert rows["toolagent: 3 M tokens, share of the maximum"].note == "no toolagent_trace.jsonl"


def test_json_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "conversation_trace.jsonl", 12)
    file = tmp_path / "rows.json"
    arguments = [
        "reproduce",
        "fast25",
        "--trace-dir",
        str(tmp_path),
        "--only",
        "fig8,fig9",
        "--quick",
        "--json",
        str(file),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "QUICK: only the first 2,000 requests of each trace" in shown.out
    assert all(text in shown.out for text in assumptions(PARAMETERS))
    assert "fig8: GPU time of prefill per request" in shown.out
    assert "conversation --policy algorithm1 --prefill 8 --decode 8: 12 requests" in shown.err
    rows = json.loads(file.read_text())
    assert {each["figure"] for each in rows} == {"fig8", "fig9"}
    fields = ["figure", "row", "published", "simulated", "deviation", "unit", "status", "note"]
    assert all(list(each) == fields for each in rows)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    assert figure_names(None) == list(FIGURES)
    with pytest.raises(ConfigError, match=r"only = 'fig2' \(--only\): no figure fig2; there are fig1, fig5"):
        figure_names("fig2")
    with pytest.raises(ConfigError, match=r"nowhere \(--trace-dir\): not a folder"):
        reproduce(str(tmp_path / "nowhere"), None, quick=True, say=print)


def test_rows_and_their_rendering() -> None:
    each = row("fig5", "mean TTFT", 4.0, 3.0, "s")
    assert (each.deviation, each.status) == (-0.25, RUN)
    assert row("fig5", "mean TTFT", None, 3.0, "s").deviation is None
    assert row("fig5", "mean TTFT", 4.0, None, "s").deviation is None
    values = [(0.983, "share"), (1.57, "gain"), (2.216, "ratio"), (4183.0, "requests"), (58.04, "ms"), (None, "s")]
    assert [render(*value) for value in values] == ["98.3 %", "+157 %", "2.22 x", "4,183", "58 ms", ""]


def test_text_says_where_a_row_was_not_run() -> None:
    found = reproduce(".", "fig9", quick=False, say=print)
    text = reproduction_text(
        msgspec.structs.replace(found, rows=[row("fig9", "x", 1.0, None, "share", status="not run")])
    )
    assert "not run" in text
