"""Loads tokenizers from a folder, a hub name or a single file, checks that they have an EOS, and registers all tokens
that may end a response."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from fastrlhf.data.hub import check_hub
from fastrlhf.data.specials import add_ends, add_template_end, generation_ends, require_eos, special_tokens

log = logging.getLogger(__name__)

HH_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\n\nAssistant: ' + message.content }}"
    "{% else %}{{ raise_exception('the hh template has no role ' + message.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""Chat template for the text format of Anthropic's HH dataset (Bai et al. 2022, arXiv 2204.05862)."""


PROBE = (
    "Hello world, it's 2024: 12345 + 6789?\n\n  def f(x):\n\treturn x  # "
    "caf\u00e9 \u4f60\u597d \U0001f600 don't  WE'LL 1st\r\n"
)
"""Text on which tokenizers differ: digits, contractions, runs of spaces, line ends, several scripts."""


def load_tokenizer(
    name_or_path: str,
    *,
    eos_token: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    model: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder, of a hub name, or of one tokenizer.json[.gz] file, and checks that it has an
    EOS.

    Its `end_ids` (data/specials.py) are the EOS, the end tokens named by the generation_config.json of the tokenizer's
    folder and of `model`, and the special token by which its chat template ends an answer.

    Args:
        eos_token: replaces the tokenizer's EOS. A token that is not in the vocabulary is added to it with id
        len(tokenizer); a model whose embedding is smaller than the new len(tokenizer) must then be resized.
        chat_template: replaces the tokenizer's template: Jinja text, or "hh" for `HH_CHAT_TEMPLATE`.

    Raises:
        ValueError: no tokenizer is found, it has no EOS, a new EOS would get the id of another token, or
            `chat_template` is not a template.
    """
    path = Path(name_or_path).expanduser()
    if is_missing_folder(name_or_path):
        raise ValueError(f"tokenizer {name_or_path}: no such folder (the name of a hub model looks like owner/name)")
    check_hub(name_or_path, f"tokenizer {name_or_path}:")
    try:
        if path.is_file():
            tokenizer = _from_file(path)
        else:
            source = str(path) if path.exists() else name_or_path
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            tokenizer = _as_stored(tokenizer, source)
    except StrictDataclassError as error:  # of the config.json beside the tokenizer; its message has several lines
        raise ValueError(f"tokenizer {name_or_path}: {' '.join(str(error).split())}") from None
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"tokenizer {name_or_path}: no tokenizer found in a folder or on the hub under this name: {reason}"
        ) from None
    if eos_token:
        _set_eos(tokenizer, eos_token)
    require_eos(tokenizer)
    for source in dict.fromkeys((name_or_path, model or name_or_path)):
        add_ends(tokenizer, generation_ends(source), f"{source}: generation_config.eos_token_id")
    if chat_template:
        tokenizer.chat_template = resolve_chat_template(chat_template, tokenizer)
    add_template_end(tokenizer)
    return tokenizer


def _set_eos(tokenizer: PreTrainedTokenizerBase, eos_token: str) -> None:
    before = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"eos_token": eos_token})
    same = [token for token, number in before.items() if number == tokenizer.eos_token_id and token != eos_token]
    if eos_token not in before and same:
        raise ValueError(
            f"eos_token: {eos_token!r} would be added with id {tokenizer.eos_token_id}, the id of {same[0]!r}, because "
            "some ids below the tokenizer's largest have no token; name a token of its vocabulary"
        )


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest id of the tokenizer plus 1. It may be larger than len(tokenizer)."""
    return token_ids(tokenizer)[-1] + 1


def token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids for which the tokenizer has a token, in ascending order. Ids between them may have no token."""
    # `get_vocab` may lack special tokens, and tokens whose bytes are no whole character.
    known = {*tokenizer.get_vocab().values(), *special_tokens(tokenizer)}
    others = (i for i in range(max(len(tokenizer), max(known) + 1)) if i not in known)
    return sorted(known | {i for i in others if _has_token(tokenizer, i)})


def _has_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    try:
        token = tokenizer.convert_ids_to_tokens(token_id)
    except (LookupError, ValueError, TypeError, OverflowError):
        return False
    return token is not None and token != tokenizer.unk_token


def is_missing_folder(name_or_path: str) -> bool:
    """Returns whether a name refers to a local folder that does not exist: it has the form of a path, or the first part
    of it is an existing folder. The hub is not asked about such a name.
    """
    path = Path(name_or_path).expanduser()
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    return not path.exists() and (looks_local or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()))


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        content = file.read()
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON; a tokenizer file is a tokenizer.json or its .gz") from None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content))


def _as_stored(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that encodes text as the tokenizer.json of its folder does, with which the model was trained.

    For some model types AutoTokenizer builds the tokenizer of the family from the vocabulary and merges only, whatever
    class the folder names. For a model of the type qwen2 whose tokenizer comes from another family, this gives other
    tokens without an error. Classes outside transformers are left as they are, because they may encode differently on
    purpose.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or not is_of_transformers(tokenizer):
        return tokenizer
    if not cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
        return tokenizer
    stored = PreTrainedTokenizerFast.from_pretrained(source)
    if _encode_probe(stored) == _encode_probe(tokenizer):
        return tokenizer
    log.warning(
        "tokenizer %s: the class %s of transformers encodes text differently from its tokenizer.json; the file is used",
        source,
        type(tokenizer).__name__,
    )
    return stored


def is_of_transformers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer runs in the Rust library and its class belongs to transformers."""
    own = type(tokenizer).__module__.partition(".")[0] == "transformers"
    return own and isinstance(tokenizer, PreTrainedTokenizerFast)


def _encode_probe(tokenizer: PreTrainedTokenizerBase) -> object:
    try:
        return tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # of the type Exception itself, if the vocabulary has no token for unknown text
        return str(error)


def resolve_chat_template(chat_template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the Jinja text of `chat_template`: the value itself, the content of the file of that name, or the
    template "hh", which writes a BOS if this tokenizer adds one to texts."""
    file = os.path.expanduser(chat_template)
    if os.path.isfile(file):  # False for text that is too long for a path
        try:
            return Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template: {chat_template} is not UTF-8 ({error.reason}); convert it") from None
    if "{" in chat_template:
        return chat_template
    if chat_template != "hh":
        raise ValueError(f'chat_template: {chat_template!r} is not a Jinja template, a file, or the name "hh"')
    has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" * has_bos + HH_CHAT_TEMPLATE
