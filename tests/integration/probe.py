"""A second SGLang plugin, for the tests: writes down what SGLang's own draft said, or spoils it. Copied beside a
fake dist-info. What it does is asked for by files in PROBE_DIR.

`on`: while it exists, every verify step's drafted tokens and every draft forward's logits go into one numbered file
each. `corrupt`: once, noise is written over the draft's feed-forward weights; the file is gone then. `delay`: while it
exists, the draft sleeps before each token it drafts.
"""

import inspect
import itertools
import os
import time
from pathlib import Path

import torch

DIRECTORY = Path(os.environ.get("PROBE_DIR", "/nonexistent"))
DELAY_S = 0.1
_DRAFT = "sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3.forward"
_numbers = itertools.count()


def register():
    if not any(frame.function == "run_scheduler_process" for frame in inspect.stack(context=0)):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify", _verify, HookType.BEFORE)
    HookRegistry.register(_DRAFT, _spoil, HookType.BEFORE)
    HookRegistry.register(_DRAFT, _draft, HookType.AFTER)


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


def _spoil(model, _input_ids, _positions, forward_batch, *_args, **_kwargs):
    if (DIRECTORY / "corrupt").exists():
        (DIRECTORY / "corrupt").unlink()
        noise = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.data.normal_(generator=noise)
    if (DIRECTORY / "delay").exists() and forward_batch.forward_mode.is_decode():
        time.sleep(DELAY_S)
