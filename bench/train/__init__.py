"""`python -m bench train sft | dpo | reward`: compares our trainer with TRL's on identical token ids of dialogues."""
