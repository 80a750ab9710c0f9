"""The CPU seam: every replaced symbol exists, and with CUDA nothing is replaced."""

import subprocess
import sys

import pytest

from megatron_instruct.platform import cpu_seam, device

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other rooms may have installed the seam in this process."""
    monkeypatch.setattr(cpu_seam, "_installed", [])


@pytest.mark.parametrize("replacement", cpu_seam.REPLACEMENTS, ids=lambda replacement: replacement.symbol)
def test_every_replaced_symbol_exists_and_says_why(replacement: cpu_seam.Replacement) -> None:
    assert hasattr(*replacement.place()) or replacement.is_optional
    assert len(replacement.why) > 10


def test_no_symbol_is_replaced_twice() -> None:
    symbols = [replacement.symbol for replacement in cpu_seam.REPLACEMENTS]
    assert len(set(symbols)) == len(symbols)


def test_installing_where_cuda_is_available_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.tensor
    with pytest.raises(AssertionError, match="nothing is replaced"):
        cpu_seam.install()
    assert torch.tensor is before


def test_with_cuda_joining_the_group_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    joined = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    machine = device.initialize()
    assert (machine.kind, machine.backend) == ("cuda", "nccl")
    assert joined == [machine.device]
    assert cpu_seam._installed == []


def test_another_megatron_core_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import package_info

    from megatron_instruct.errors import ConfigError

    monkeypatch.setattr(package_info, "__version__", "0.21.0")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.21\.0 is installed.*pip install"):
        cpu_seam.install()


def test_on_cpu_tensors_asked_for_on_cuda_land_on_the_cpu() -> None:
    code = (
        "from megatron_instruct.platform import cpu_seam; cpu_seam.install(); import torch;"
        "made = [torch.zeros(2, device='cuda'), torch.tensor([1], device='cuda:0'), torch.ones(1).cuda(), torch.empty(2, pin_memory=True)];"
        "assert all(tensor.device.type == 'cpu' for tensor in made); assert isinstance(torch.cuda.Stream, type);"
        "meta = torch.device('meta'); meta.__enter__(); assert torch.zeros(2).is_meta and torch.empty(2).is_meta;"
        "meta.__exit__(None, None, None);"
        "assert torch.ones(1).type() == 'torch.FloatTensor'; print(len(cpu_seam._installed))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(len(cpu_seam.REPLACEMENTS)), done.stderr


@pytest.mark.parametrize(
    ("omp", "processes", "threads"), [("3", "1", 3), ("1", "1", 1), ("3", "2", 3), ("", "2", 4), ("1", "2", 4), ("0", "16", 1)]
)
def test_threads_of_a_process(omp: str, processes: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(device.os, "cpu_count", lambda: 8)
    assert device.default_threads() == threads


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_instruct.errors import ConfigError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="at most one process a GPU"):
        device.current()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_adds_its_weight_gradient_to_the_sum_and_makes_none_of_its_own(dtype: str) -> None:
    """In a process of its own, since the seam is installed in it."""
    code = f"""
import torch
from megatron_instruct.platform import device, noise
noise.silence()
machine = device.initialize(threads=1)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear
from megatron_instruct.models.build import BuildOptions, join_model_parallel_groups, make_transformer_config
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture
join_model_parallel_groups(ParallelLayout(), seed=1)
architecture = make_architecture({{}}, preset_name="tiny", vocab_size=500, seq_length=32)
config = make_transformer_config(architecture, ParallelLayout(), machine, BuildOptions(fuse_weight_gradients=True))
weight = torch.randn(6, 4, dtype=torch.{dtype}).requires_grad_()
weight.main_grad = torch.ones(6, 4)
before = torch.randn(5, 4, dtype=torch.{dtype})
options = {{"allreduce_dgrad": False, "sequence_parallel": False}}
linear(before, weight, None, config.gradient_accumulation_fusion, **options).sum().backward()
wanted = 1 + (torch.ones(5, 6, dtype=torch.{dtype}).t() @ before).float()
torch.testing.assert_close(weight.main_grad, wanted)
assert weight.grad is None
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_logits_of_many_ids_have_the_values_and_gradients_of_a_plain_product_and_are_not_copied() -> None:
    """In a process of its own, since the seam is installed in it."""
    code = """
import torch
from megatron_instruct.platform import device, noise
noise.silence()
device.initialize(threads=1)
from megatron.core.tensor_parallel import layers
from megatron_instruct.models.build import join_model_parallel_groups
from megatron_instruct.models.layout import ParallelLayout
join_model_parallel_groups(ParallelLayout(), seed=1)
options = {"allreduce_dgrad": False, "sequence_parallel": False}
for length, batch, ids in ((7, 3, 900), (1, 1, 40), (7, 3, 60)):
    weight, before = torch.randn(ids, 4).requires_grad_(), torch.randn(length, batch, 4).requires_grad_()
    weight.main_grad = torch.ones(ids, 4)
    after = layers.linear_with_grad_accumulation_and_async_allreduce(before, weight, None, True, **options)
    by_ids = after.permute(2, 0, 1).is_contiguous()
    assert by_ids is (ids > 4 * length * batch)
    gradient = torch.randn(ids, length, batch).permute(1, 2, 0) if by_ids else torch.randn(length, batch, ids)
    rows, _ = layers.prepare_input_tensors_for_wgrad_compute(gradient, before)
    assert rows.data_ptr() == gradient.data_ptr()
    after.backward(gradient)
    torch.testing.assert_close(after, before @ weight.t())
    torch.testing.assert_close(before.grad, gradient @ weight)
    torch.testing.assert_close(weight.main_grad, 1 + gradient.reshape(-1, ids).t() @ before.reshape(-1, 4))
out = torch.empty(3, 5)
layers.torch.matmul(torch.ones(3, 2), torch.ones(2, 5), out=out)
torch.testing.assert_close(out, torch.full((3, 5), 2.0))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_are_megatron_cores_in_either_order(interleaved: bool) -> None:
    """In a process of its own, since the seam is installed in it."""
    code = f"""
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron_instruct.platform import cpu_seam
half = torch.arange(7)[:, None] * torch.logspace(0, -3, 4)
angles = (half.repeat_interleave(2, dim=-1) if {interleaved} else torch.cat([half, half], dim=-1))[:, None, None]
queries = torch.randn(7, 2, 3, 8)
wanted = rope_utils._apply_rotary_pos_emb_bshd(queries, angles, rotary_interleaved={interleaved}, mscale=1.5)
cpu_seam.install()
found = rope_utils._apply_rotary_pos_emb_bshd(queries, angles, rotary_interleaved={interleaved}, mscale=1.5)
torch.testing.assert_close(found, wanted)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
