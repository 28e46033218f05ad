"""What merged files and LoRA files say of themselves."""
