"""The tokenizer of a folder in the metadata of GGUF, for the two kinds that llama.cpp shares with Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.files import read_json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}\\p{{N}}{_REST}": "qwen2",
}
"""llama.cpp's names of the patterns by which byte-level tokenizers cut text before they merge."""


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Add the tokens, their kinds, merges or scores and the special tokens of `folder`, filled up to `size` tokens.

    Raises:
        ApiqError: llama.cpp has no tokenizer of this kind.
    """
    import gguf

    tokenizer = read_json(folder / "tokenizer.json")
    kind = _kind(tokenizer, folder)
    if kind == "llama":
        tokens, scores, types = zip(*gguf.LlamaHfVocab(folder).all_tokens(), strict=True)
        missing = size - len(tokens)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([*scores, *[-1000.0] * missing])
        listed, kinds = list(tokens), list(types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        listed, kinds = _byte_level(tokenizer, gguf.TokenType)
        missing = size - len(listed)
    writer.add_token_list([*listed, *(f"[PAD{size - missing + i}]" for i in range(missing))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * missing])
    gguf.SpecialVocab(folder, load_merges=kind != "llama", n_vocab=size).add_to_gguf(writer, quiet=True)


def check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer that llama.cpp does not have.

    Raises:
        ApiqError: it has none of this kind.
    """
    _kind(read_json(folder / "tokenizer.json"), folder)


def _kind(tokenizer: dict[str, Any], folder: Path) -> str:
    """`llama` for SentencePiece with bytes, else the name of the pattern of a byte-level tokenizer."""
    model, cut = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    steps = cut.get("pretokenizers", [cut])
    if model["type"] == "BPE" and steps[-1].get("type") == "ByteLevel":
        if steps[-1].get("use_regex") and len(steps) == 1:
            return "gpt-2"
        pattern = steps[0].get("pattern", {}).get("Regex")
        if pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
    raise ApiqError(
        f"the tokenizer in {folder} ({model['type']}) is none that GGUF can describe: byte-level BPE cut as by GPT-2, "
        "Llama 3 or Qwen 2, or SentencePiece BPE with bytes; export with --format compressed-tensors."
    )


def _byte_level(tokenizer: dict[str, Any], types: Any) -> tuple[list[str], list[int]]:
    names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    kinds: dict[int, int] = {number: types.NORMAL for number in names}
    for added in tokenizer.get("added_tokens", []):
        names[added["id"]] = added["content"]
        kinds[added["id"]] = types.CONTROL if added["special"] else types.USER_DEFINED
    numbers, unused = range(max(names) + 1), int(types.UNUSED)
    return [names.get(n, f"[PAD{n}]") for n in numbers], [kinds.get(n, unused) for n in numbers]
