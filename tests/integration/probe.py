"""A second SGLang plugin, for the tests: writes down what SGLang's own draft said. Copied beside a fake dist-info.

While the file `on` exists in PROBE_DIR, every verify step's drafted tokens and every draft forward's logits
go into one numbered file each.
"""

import inspect
import itertools
import os
from pathlib import Path

import torch

DIRECTORY = Path(os.environ.get("PROBE_DIR", "/nonexistent"))
_numbers = itertools.count()


def register():
    if not any(frame.function == "run_scheduler_process" for frame in inspect.stack(context=0)):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify", _verify, HookType.BEFORE)
    HookRegistry.register("sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3.forward", _draft, HookType.AFTER)


def _write(record):
    if (DIRECTORY / "on").exists():
        number = next(_numbers)
        torch.save(record, DIRECTORY / f"{number:06d}.tmp")
        (DIRECTORY / f"{number:06d}.tmp").rename(DIRECTORY / f"{number:06d}.pt")


def _verify(_worker, batch, *_args, **_kwargs):
    drafted = batch.spec_info.draft_token.view(len(batch.reqs), -1)
    _write({"kind": "verify", "start": batch.seq_lens.tolist(), "drafted": drafted.clone()})


def _draft(output, _model, _input_ids, positions, *_args, **_kwargs):
    _write({"kind": "draft", "positions": positions.tolist(), "logits": output.next_token_logits.clone()})
