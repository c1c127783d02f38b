"""Installing the kernels, in a fresh interpreter each, and the settings."""

import os
import subprocess
import sys

import pytest

from onlinespec.cpu import settings
from onlinespec.cpu.errors import UnknownImportError, UnknownKernelError, UnsupportedOnCpuError


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def test_installed_kernels_answer_and_unknown_ones_are_refused_by_name():
    done = run_python(
        """
import torch
from onlinespec.cpu.errors import UnsupportedOnCpuError
from onlinespec.cpu.install import KERNELS, install, is_installed
assert not is_installed()
assert install() and install() and is_installed()
import sgl_kernel
from sgl_kernel import verify_tree_greedy_cpu, rotate_input_ids_cpu
assert all(getattr(sgl_kernel, name) is getattr(torch.ops.sgl_kernel, name) for name in KERNELS)
assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
def refused(call, kernel):
    try:
        call()
    except UnsupportedOnCpuError as error:
        assert f"sgl_kernel.{kernel}," in str(error), error
    else:
        raise SystemExit(kernel + " was not refused")
refused(lambda: torch.ops.sgl_kernel.fused_experts_cpu(1), "fused_experts_cpu")
refused(lambda: rotate_input_ids_cpu(1), "rotate_input_ids_cpu")
refused(lambda: __import__("sgl_kernel", fromlist=["x"]).shiny_cpu, "shiny_cpu")
try:
    from sgl_kernel import gone
except ImportError as error:
    assert "sgl_kernel.gone" in str(error)
import torchvision  # fails without the operators
"""
    )

    assert done.returncode == 0, done.stderr


def test_a_real_sgl_kernel_with_cpu_kernels_is_left_alone(tmp_path):
    (tmp_path / "sgl_kernel.py").write_text(
        "import torch\nlibrary = torch.library.Library('sgl_kernel', 'DEF')\n"
        "library.define('extend_attention_cpu(Tensor x) -> Tensor')\n"
    )

    done = run_python(
        "from onlinespec.cpu.install import install, is_installed; assert not install() and not is_installed()",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()]),
    )

    assert done.returncode == 0, done.stderr


def test_settings_import_neither_torch_nor_sglang():
    done = run_python(
        "import sys; from onlinespec.cpu import settings; settings.is_needed(); settings.flags([]);"
        "assert not {'torch', 'sglang'} & set(sys.modules)"
    )

    assert done.returncode == 0, done.stderr


def test_hiding_every_cuda_device_makes_the_cpu_path_needed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os.path, "exists", lambda path: False)

    assert settings.is_needed()


def test_flags_add_what_the_cpu_needs():
    added = settings.flags(["--model-path", "m"])

    assert added[added.index("--device") + 1] == "cpu"
    assert added[added.index("--prefill-attention-backend") + 1] == "intel_amx"
    assert added[added.index("--decode-attention-backend") + 1] == "intel_amx"
    assert "--sleep-on-idle" in added


@pytest.mark.parametrize("given", [["--dtype", "bfloat16"], ["--dtype=bfloat16"]])
def test_a_flag_the_user_gave_is_not_added(given):
    added = settings.flags(given)

    assert "--dtype" not in added
    assert "float32" not in added


def test_flags_are_complete_when_they_were_added_before():
    assert settings.flags(settings.flags([])) == []


def test_a_users_attention_backend_stands_alone():
    added = settings.flags(["--attention-backend", "torch_native"])

    assert not any("attention-backend" in flag for flag in added)


@pytest.mark.parametrize("flag", [["--tp-size", "2"], ["--tp=2"], ["--tensor-parallel-size", "2"]])
def test_each_tensor_parallel_rank_gets_cores_of_its_own(monkeypatch, flag):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})

    assert settings.environment(flag)["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"


def test_more_ranks_than_cores_share_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})

    assert settings.environment(["--tp", "2"])["SGLANG_CPU_OMP_THREADS_BIND"] == "5|5"


def test_the_environment_of_one_rank_binds_no_cores():
    environment = settings.environment([])

    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment


def test_torch_compile_stays_off_unless_asked_for():
    assert settings.environment([])["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in settings.environment(["--enable-torch-compile"])


def test_refusals_read_as_absent_to_probes_and_guarded_imports():
    assert issubclass(UnknownKernelError, UnsupportedOnCpuError)
    assert issubclass(UnknownKernelError, AttributeError)
    assert issubclass(UnknownImportError, UnsupportedOnCpuError)
    assert issubclass(UnknownImportError, ImportError)
