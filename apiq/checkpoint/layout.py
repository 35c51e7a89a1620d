"""The names of the files of a checkpoint."""

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor, and the shape of each packed linear."""
REST = "rest.safetensors"
"""Everything outside the blocks."""


def block_file(index: int) -> str:
    """The file of block `index`."""
    return f"block-{index:03d}.safetensors"
