"""A tokenizer with a dozen words, for tests that count every token."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

EOS, BOS, UNK = 0, 1, 2
WORDS = ["<eos>", "<bos>", "<unk>", *"abcdef", "Human:", "Assistant:", "[user]", "[assistant]", "[end]"]
A, B, C, D, E, F, HUMAN, ASSISTANT, IS_USER, IS_ASSISTANT, END = range(3, 14)


def words(post: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    """Makes a tokenizer whose ids are positions in WORDS. `post` is the post-processing template, such as "<bos>
    $A"."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if post:
        core.post_processor = TemplateProcessing(single=post, special_tokens=[("<eos>", EOS), ("<bos>", BOS)])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=core, **({"eos_token": "<eos>", "unk_token": "<unk>"} | special))
