"""Two small tokenizers with a handful of merges: byte-level BPE, and SentencePiece with byte fallback."""

import string

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
MERGES = [("d", "e"), ("de", "f"), (SPACE, "de"), (SPACE, "def"), (SPACE, "f"), ("e", "s")]
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_level() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The last two merges make " f" and two newlines
    merges = [("d", "e"), ("de", "f"), ("\u0120", "f"), ("\u010a", "\u010a")]
    words = [*SPECIALS, *letters, *("".join(pair) for pair in merges)]
    core = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return _fast(core)


def sentencepiece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """Makes a tokenizer like those of Llama 2 and Mistral, which put BOS and a space before every text.

    With `legacy` a space also follows every special token.
    """
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *string.ascii_letters, *string.digits, *":.<>|_"]
    words = [*SPECIALS, *pieces, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])  # pyright: ignore[reportAttributeAccessIssue]
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])  # pyright: ignore[reportAttributeAccessIssue]
    return _fast(core)


def _fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[3:])})
    return tokenizer
