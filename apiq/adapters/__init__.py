"""PEFT adapters inside one block."""
