"""Tensors that stay in their file."""

from pathlib import Path

import pytest
import torch

from megatron_instruct.conversion import mapped, torch_dist
from megatron_instruct.conversion.mapped import map_tensor


@pytest.mark.parametrize("position", [0, 2, 4096, 4099])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mapped_tensor_holds_what_the_file_does(position: int, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "file"
    wanted = torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    file.write_bytes(b"x" * position + wanted.view(torch.uint8).numpy().tobytes() + b"rest")
    tensor = map_tensor(file, position, wanted.shape, dtype)
    assert torch.equal(tensor, wanted) and tensor.data_ptr() % dtype.itemsize == 0
    mapped.forget_pages()
    assert torch.equal(tensor, wanted), "it comes from the file again"
    before = file.read_bytes()
    tensor.zero_()
    assert file.read_bytes() == before


def test_a_tensor_beyond_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 7)
    assert map_tensor(file, 7, (0, 3), torch.float32).shape == (0, 3)
    with pytest.raises(ValueError, match="greater than file size"):
        map_tensor(file, 0, (2,), torch.float32)


def test_a_part_of_a_box_is_read_wherever_the_box_lies(tmp_path: Path) -> None:
    """Whether the tensor was saved whole, transposed, or at an odd place, as torch's own writer puts it."""
    whole = torch.arange(6 * 5 * 4, dtype=torch.bfloat16).reshape(1, 6, 5, 4)
    for saved in (whole, whole.transpose(1, 2).contiguous().transpose(1, 2)):
        file = tmp_path / "file"
        with open(file, "wb") as stream:
            stream.write(b"x" * 13)
            torch.save(saved, stream)
            end = stream.tell()
        chunk = torch_dist._Chunk(offsets=(2, 0, 0, 0), sizes=(1, 6, 5, 4), file=file, position=13, length=end - 13)
        for box in ([(2, 3), (0, 6), (0, 5), (0, 4)], [(2, 3), (1, 4), (0, 5), (0, 4)], [(2, 3), (5, 6), (2, 3), (1, 3)]):
            part = torch_dist._load("weight", chunk, torch.bfloat16, box)
            place = tuple(slice(start - offset, stop - offset) for (start, stop), offset in zip(box, chunk.offsets, strict=True))
            assert torch.equal(part, whole[place])
