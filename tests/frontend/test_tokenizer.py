from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from mooncake.core.errors import ModelError
from mooncake.frontend.tokenizer import TemplateFailed, Tokenizer
from tests.tiny_tokenizer import byte_level

SMOLLM = Path.home() / ".cache/mooncake/models/smollm2-135m-instruct"


def sentencepiece_like() -> Library:
    """Llama 2's shape: bytes as tokens, a word border as a character, the first space stripped."""
    words = ["<unk>", "\u2581hello", "\u2581world", "\u2581", "h", "e", "l", "o", "é", "你"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    library = Library(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["</s>"])
    return library


KINDS = {"byte level": Tokenizer(byte_level()), "sentencepiece": Tokenizer(sentencepiece_like())}


def incremental(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_joined_are_the_full_decode(kind: str, data: st.DataObject) -> None:
    """Special and added tokens, ids that the vocabulary does not have, and, if byte level, any cut characters."""
    tokenizer = KINDS[kind]
    some_id = st.integers(0, tokenizer.vocab_size + 5)
    if kind == "sentencepiece":
        some_id = some_id.filter(lambda token_id: not 10 <= token_id < 266)
    token_ids = data.draw(st.lists(some_id, max_size=40))
    assert incremental(tokenizer, token_ids) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_text_comes_back(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert incremental(tokenizer, token_ids) == tokenizer.decode(token_ids)
    if kind == "byte level" and "<" not in text:
        assert incremental(tokenizer, token_ids) == text


def test_a_character_comes_when_it_is_complete(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦊", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    texts = [detokenizer.push(t) for t in token_ids]
    assert len(texts) > 1 and texts == [""] * (len(texts) - 1) + ["🦊"]
    assert [detokenizer.push(t) for t in token_ids[:1]] + [detokenizer.flush()] == ["", "\ufffd"]


def test_tokens_by_themselves() -> None:
    llama, gpt = KINDS["sentencepiece"], KINDS["byte level"]
    assert [llama.token_bytes(i) for i in (1, 10, 9)] == [b" hello", b"\x00", "你".encode()]
    special = gpt.encode("<|im_end|>", add_special_tokens=False)
    assert [gpt.token_bytes(i) for i in special] == [b"<|im_end|>"]


def test_folder(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_ids == tuple(tokenizer.encode("<|im_end|>", add_special_tokens=False))
    with pytest.raises(TemplateFailed, match="no tools here"):
        tokenizer.render_chat([{"role": "tool", "content": "hi"}])
    with pytest.raises(TemplateFailed, match="no chat template"):
        KINDS["byte level"].render_chat([])


def test_template_environment(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    template = (
        "{{ {'a': '<é>'} | tojson }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == (7,)
    assert loaded.render_chat([{"content": "x"}, {"content": "y"}]) == '{"a": "<é>"}x4'
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(TemplateFailed):
        Tokenizer.load(tmp_path).render_chat([])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "cannot read .*tokenizer.json"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("chat_template.jinja", "{% for %}", "chat template has an error in line 1"),
    ],
)
def test_bad_folder(model_folder: Path, tmp_path: Path, name: str, content: str | None, says: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=says):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(not SMOLLM.is_dir(), reason=f"no SmolLM2 in {SMOLLM}")
def test_smollm2() -> None:
    tokenizer = Tokenizer.load(SMOLLM)
    prompt = tokenizer.render_chat([{"role": "user", "content": "你好 🎉"}])
    assert prompt.endswith("<|im_start|>user\n你好 🎉<|im_end|>\n<|im_start|>assistant\n")
    token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert incremental(tokenizer, token_ids) == tokenizer.decode(token_ids)
    assert tokenizer.eos_ids
