"""`python -m bench train sft | dpo | reward`: our trainer and TRL's on the same token ids of real dialogues."""
