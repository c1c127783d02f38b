"""Every way a checkpoint can be wrong is refused with the file or field, what was found and what was wanted."""

import ast
import hashlib
import json
import re
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.config import parse_draft_config, read_target
from onlinespec.draft.fresh import build_fresh_draft, fresh_config, read_embedding
from onlinespec.draft.header import (
    aux_layers,
    canonical_names,
    check_draft,
    digest,
    digest_of_bytes,
    read_header,
    read_shapes,
    target_digest,
)
from onlinespec.errors import CheckpointError
from tests.draft.tiny import TARGET_JSON, build_draft, write_target


@pytest.fixture
def target(tmp_path):
    return write_target(tmp_path / "target")


@pytest.fixture
def folder(tmp_path):
    draft = build_draft()
    write_draft(tmp_path / "draft", draft.config, draft.weights())
    return tmp_path / "draft"


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        raw.pop(name, None)
        if value is not ...:
            raw[name] = value
    (folder / "config.json").write_text(json.dumps(raw))


def edit_weights(folder, changes):
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"aux_layers": (1, 3, 5), "rope_llama3": (8.0, 1.0, 4.0, 64)},
        {"draft_vocab_size": 11, "fc_norm": True},
        {"norm_before_fc": True},
        {"num_layers": 3, "intermediate_size": 40, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4},
        {"num_aux": 1, "aux_layers": (6,)},
        {"use_aux": False, "num_aux": 1, "norm_output": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_written_draft_reads_back_bit_for_bit(tmp_path, target, changes):
    draft = build_draft(**changes)
    write_draft(tmp_path / "out", draft.config, draft.weights())

    config, weights = read_draft(tmp_path / "out")

    assert config == draft.config == check_draft(tmp_path / "out", read_target(target), 128)
    assert weights.keys() == draft.weights().keys() == read_shapes(tmp_path / "out").keys()
    assert all(torch.equal(tensor, draft.weights()[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLMEagle"]},
            r"is .*wanted \['LlamaForCausalLMEagle3'\]; that is EAGLE, not EAGLE-3",
        ),
        (
            {"architectures": ["Eagle3DeepseekV2ForCausalLM"]},
            r"is .*wanted \['LlamaForCausalLMEagle3'\]; multi-head latent attention is not reproduced",
        ),
        (
            {"architectures": ["GptOssForCausalLMEagle3"]},
            r"is .*wanted \['LlamaForCausalLMEagle3'\]; no other decoder is reproduced",
        ),
        ({"model_type": "llama4_text"}, "model_type is llama4_text, wanted llama; .*intermediate_size_mlp"),
        ({"model_type": "qwen3"}, "model_type is qwen3, wanted llama; .*that model's defaults: write llama"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            r"is \['LlamaForCausalLM'\], wanted .*Eagle3.*--draft init",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, wanted a positive integer"),
        ({"num_hidden_layers": 2}, r"layers\.1\..* is missing \(9 missing in all\)"),
        ({"quantization_config": {"bits": 4}}, "quantised draft, wanted none; .*bfloat16"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, wanted False"),
        ({"attention_bias": True}, "attention_bias is True, wanted False"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, wanted silu; SGLang's LlamaMLP takes no other"),
        ({"hidden_size": ...}, "hidden_size is missing, wanted a positive integer"),
        ({"hidden_size": 32, "target_hidden_size": 16}, "hidden_size is 32, wanted the target's 16"),
        ({"target_hidden_size": 32}, "target_hidden_size is 32, wanted the target's 16"),
        ({"vocab_size": 30}, "vocab_size is 30, wanted the target's 29"),
        ({"draft_vocab_size": 30}, "draft_vocab_size is 30, wanted at most vocab_size 29"),
        ({"draft_vocab_size": None}, "draft_vocab_size is missing, wanted 29.*swap would overwrite"),
        ({"num_aux_hidden_states": 4}, "layer_ids is the default, wanted 4 distinct"),
        ({"num_aux_hidden_states": 1}, "layer_ids is the default, wanted 1 distinct"),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]},
            r"ids is \[1, 3, 5\] at top level, wanted it inside eagle_config; SGLang reads it nowhere else",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}},
            r"layer_ids is \[\], wanted a list of layers; leave it out",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}},
            "num_aux_hidden_states is 3, wanted 2, the number of eagle_aux_hidden_state_layer_ids",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}},
            r"layer_ids is \[1, 3, 7\], wanted 3 distinct layers from -1 to 6",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 3]}},
            r"is \[1, 3, 3\], wanted 3 distinct",
        ),
        (
            {"max_position_embeddings": 64},
            "is 64, wanted at least the serving context of 100 tokens; set it to 100",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is yarn, wanted default or llama3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, wanted a divisor of 4"),
        (
            {"intermediate_size": 25},
            r"has shape \[.*24.*\], config.json wants \[.*25.*\]; give the config.json",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused_with_its_field(folder, target, changes, message):
    edit_config(folder, **changes)

    with pytest.raises(CheckpointError, match=message) as error:
        check_draft(folder, read_target(target), 100)

    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_tokens.weight": torch.zeros(29, 16)}, "embed_tokens.weight.*would overwrite it; remove it"),
        ({"layers.0.weight": torch.zeros(2)}, r"unknown tensor layers.0.weight \(1 unknown in all\)"),
        ({"midlayer.mlp.up_proj.weight": None}, "midlayer.mlp.up_proj.weight is missing"),
        ({"norm.weight": torch.zeros(15)}, r"norm.weight has shape \[15\], config.json wants \[16\]"),
        (
            {"fc.weight": torch.zeros(16, 32)},
            r"has shape \[16, 32\], config.json wants \[16, 48\]; num_aux_hid",
        ),
        ({"norm.weight": torch.zeros(16, dtype=torch.int8)}, "norm.weight has dtype I8, wanted F32.*quantised"),
        (
            {"norm.weight": torch.zeros(16, dtype=torch.float8_e4m3fn)},
            "has dtype F8_E4M3, wanted F32.*quantised",
        ),
        ({"norm.weight": torch.zeros(16, dtype=torch.float64)}, "norm.weight has dtype F64, wanted F32.*convert it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, target, changes, message):
    edit_weights(folder, changes)

    with pytest.raises(CheckpointError, match=message):
        check_draft(folder, read_target(target))
    with pytest.raises(CheckpointError, match=message):
        read_draft(folder)


SPELLINGS = {
    "midlayer.": "layers.0.",
    "fc_norm.0.": "aux_norm_low.",
    "fc_norm.1.": "aux_norm_mid.",
    "fc_norm.2.": "aux_norm_high.",
    "layers.1.": "model.layers.1.",
    "norm.": "model.norm.",
}


def test_every_spelling_that_sglang_reads_is_read_and_ours_is_given_back(tmp_path, target):
    draft = build_draft(num_layers=2, fc_norm=True)
    write_draft(tmp_path, draft.config, draft.weights())
    edit_config(tmp_path, fc_norm=..., use_aux_norm=True)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {}
    for name, tensor in ours.items():
        spelling = next((spelling for spelling in SPELLINGS if name.startswith(spelling)), "")
        theirs[SPELLINGS.get(spelling, "") + name.removeprefix(spelling)] = tensor
    save_file(theirs, tmp_path / "model.safetensors")

    config, weights = read_draft(tmp_path)

    assert len(ours.keys() & theirs.keys()) == 2
    assert config == check_draft(tmp_path, read_target(target)) == draft.config
    assert weights.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights.items())


def test_one_tensor_under_two_names_is_refused(folder, target):
    edit_weights(folder, {"layers.0.hidden_norm.weight": torch.ones(16)})

    with pytest.raises(
        CheckpointError, match=r"holds layers.0.hidden_norm.weight and midlayer.hidden_norm.weight, two"
    ):
        check_draft(folder, read_target(target))


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({"num_layers": 2}, {"layers.1.input_layernorm.weight": torch.ones(16)}),
        ({"use_aux": False, "num_aux": 1}, {"fc.weight": torch.ones(16, 48), "input_norm.weight": torch.ones(48)}),
    ],
    ids=["norm of an embedding that no later layer reads", "fc where nothing is captured"],
)
def test_tensors_that_sglang_has_and_never_reads_may_be_there_and_are_not_kept(tmp_path, target, changes, unread):
    draft = build_draft(**changes)
    write_draft(tmp_path, draft.config, draft.weights())
    edit_weights(tmp_path, unread)

    assert check_draft(tmp_path, read_target(target)) == draft.config
    assert read_draft(tmp_path)[1].keys() == draft.weights().keys()


def test_the_aux_switch_of_eagle_is_read_and_what_stands_before_fc_is_then_dropped(folder):
    raw = json.loads((folder / "config.json").read_text())
    eagle = {"use_aux_hidden_state": False, "eagle_aux_hidden_state_layer_ids": [1, 3, 5], "norm_before_fc": True}

    config = parse_draft_config(raw | {"eagle_config": eagle, "fc_norm": True}, "x")

    assert (config.use_aux, config.num_aux, config.aux_layers, config.has_fc) == (False, 1, None, False)
    assert (config.fc_norm, config.norm_before_fc) == (False, False)
    assert config.to_json()["eagle_config"] == {"use_aux_hidden_state": False}
    assert parse_draft_config(config.to_json(), "x") == config
    assert aux_layers(config, 8) == []


def sglang_layers_to_capture(module: str, num_layers: int, ids: list[int] | None) -> list[int]:
    """What SGLang's own method makes of the ids, run out of its source: importing the model takes half a minute."""
    source = Path(find_spec("sglang").origin).parent / "srt" / "models" / f"{module}.py"
    name = "set_eagle3_layers_to_capture"
    found = [n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name]
    found[0].args.args[1].annotation = None
    scope: dict = {}
    exec(compile(ast.Module([found[0]], []), str(source), "exec"), scope)
    model = SimpleNamespace(
        pp_group=SimpleNamespace(is_last_rank=True),
        config=SimpleNamespace(num_hidden_layers=num_layers),
        model=SimpleNamespace(),
    )
    scope[name](model, ids)
    return model.model.layers_to_capture


@pytest.mark.parametrize("module", ["llama", "qwen2", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("ids", [None, (1, 3, 5), (-1, 11, 20), (9, 4, 1)])
def test_layers_are_numbered_as_sglang_numbers_them_and_rows_go_upwards(module, ids):
    config = build_draft(aux_layers=ids).config

    found = aux_layers(config, 24)

    # SGLang tests `i in layers_to_capture` while it goes through the layers: the order of the ids is lost.
    assert found == sorted(sglang_layers_to_capture(module, 24, None if ids is None else list(ids)))


def test_values_that_are_not_finite_are_refused_with_their_number(folder):
    edit_weights(folder, {"norm.weight": torch.tensor([float("nan"), float("inf"), *[1.0] * 14])})

    with pytest.raises(CheckpointError, match=r"norm.weight holds 2 values that are not finite"):
        read_draft(folder)


@pytest.mark.parametrize("size", [0, 5, 8, 200, -1, -1000])
def test_a_file_cut_anywhere_is_refused_as_truncated(folder, target, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])

    with pytest.raises(CheckpointError, match=r"truncated.*copy it again"):
        check_draft(folder, read_target(target))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 4) + b"[1 2", "not a safetensors file"),
        (struct.pack("<Q", 10) + b'{"a":"b"} ', "not a safetensors file"),
        (
            struct.pack("<Q", 66) + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'.ljust(66) + b"\0" * 8,
            "spans 8 bytes, wanted 12",
        ),
        (struct.pack("<Q", 2) + b"{}" + b"junk", "too long"),
    ],
    ids=["no-json", "no-entry", "wrong-span", "too-long"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(folder, target, data, message):
    (folder / "model.safetensors").write_bytes(data)

    with pytest.raises(CheckpointError, match=message):
        check_draft(folder, read_target(target))


def test_missing_files_are_named(tmp_path, folder, target):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "nowhere" / "config.json"))):
        read_draft(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=re.escape(str(folder / "model.safetensors"))):
        check_draft(folder, read_target(target))
    with pytest.raises(CheckpointError, match="no such file"):
        digest(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_draft(folder)


def test_a_vocabulary_map_of_ids_instead_of_offsets_is_refused(tmp_path):
    draft = build_draft(draft_vocab_size=11)
    write_draft(tmp_path, draft.config, draft.weights() | {"d2t": draft.target_ids_W})

    with pytest.raises(CheckpointError, match=r"d2t maps to ids .*offsets"):
        read_draft(tmp_path)


def test_a_pruned_draft_may_lack_its_mask_but_not_its_map(tmp_path):
    draft = build_draft(draft_vocab_size=11)
    write_draft(tmp_path, draft.config, draft.weights())

    edit_weights(tmp_path, {"t2d": None})
    assert "t2d" not in read_draft(tmp_path)[1]
    edit_weights(tmp_path, {"d2t": None})
    with pytest.raises(CheckpointError, match="d2t is missing"):
        read_draft(tmp_path)


def test_writing_a_wrong_shape_writes_nothing(tmp_path):
    draft = build_draft()

    with pytest.raises(CheckpointError, match=r"norm.weight has shape \(3,\), wanted \(16,\)"):
        write_draft(tmp_path / "out", draft.config, draft.weights() | {"norm.weight": torch.ones(3)})

    assert not (tmp_path / "out").exists()


def test_both_spellings_of_rope_are_read():
    raw = build_draft().config.to_json()
    old = {name: value for name, value in raw.items() if name != "rope_parameters"}
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

    assert parse_draft_config(raw | {"rope_theta": 7.0}, "x").rope_theta == 1000.0
    assert parse_draft_config(old | {"rope_theta": 500.0}, "x").rope_theta == 500.0
    assert parse_draft_config(old | {"rope_scaling": scaling}, "x").rope_llama3 == (8.0, 1.0, 4.0, 128)


def test_the_header_is_judged_without_torch(folder, target):
    script = (
        "import sys; from onlinespec.draft.header import check_draft, digest, target_digest;"
        "from onlinespec.draft.config import read_target;"
        f"check_draft({str(folder)!r}, read_target({str(target)!r})); digest({str(folder)!r});"
        f"target_digest({str(target)!r}); sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_digest_is_the_sha256_of_the_weights(folder):
    data = (folder / "model.safetensors").read_bytes()

    assert digest(folder) == hashlib.sha256(data).hexdigest() == digest_of_bytes(data)


def test_target_digest_sees_config_weights_and_names_but_not_time(tmp_path):
    first, same = write_target(tmp_path / "a"), write_target(tmp_path / "b")
    other_weights, other_config = write_target(tmp_path / "c", seed=1), write_target(tmp_path / "d", rms_norm_eps=1e-6)

    digests = [target_digest(path) for path in (first, same, other_weights, other_config)]

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_target_digest_sees_a_byte_in_the_middle_of_a_tensor(target):
    before = target_digest(target)
    file = target / "model.safetensors"
    table = read_header(file)["model.embed_tokens.weight"]
    data = bytearray(file.read_bytes())
    data[(table.start + table.end) // 2 + 100] ^= 1
    file.write_bytes(data)

    assert target_digest(target) != before


def test_a_fresh_draft_starts_from_the_targets_head_and_norm_and_fits_it(tmp_path, target):
    config, weights = build_fresh_draft(target, seed=5)
    write_draft(tmp_path / "fresh", config, weights)

    tensors = load_file(target / "model.safetensors")
    assert check_draft(tmp_path / "fresh", read_target(target)) == config
    assert torch.equal(weights["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(weights["norm.weight"], tensors["model.norm.weight"])
    assert (config.num_aux, config.aux_layers, config.draft_vocab_size) == (3, None, 29)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == canonical_names(config)
    assert 0.1 < float(weights["fc.weight"].std()) * 48**0.5 < 2
    assert all(torch.equal(tensor, weights[name]) for name, tensor in build_fresh_draft(target, seed=5)[1].items())
    assert not torch.equal(weights["fc.weight"], build_fresh_draft(target, seed=6)[1]["fc.weight"])


def test_a_fresh_draft_can_have_a_shape_of_its_own(tmp_path, target):
    shape = {"num_layers": 2, "intermediate_size": 40, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    wanted = build_draft(**shape, fc_norm=True, norm_output=True, aux_layers=(1, 3, 5)).config
    (tmp_path / "mine.json").write_text(json.dumps(wanted.to_json()))

    config, weights = build_fresh_draft(target, 5, tmp_path / "mine.json")

    write_draft(tmp_path / "fresh", config, weights)
    assert check_draft(tmp_path / "fresh", read_target(target)) == config == wanted
    assert torch.equal(weights["lm_head.weight"], load_file(target / "model.safetensors")["lm_head.weight"])


def test_a_fresh_draft_takes_a_pruned_vocabulary_from_the_draft_whose_shape_it_has(tmp_path, target):
    given = build_draft(draft_vocab_size=11)
    write_draft(tmp_path / "given", given.config, given.weights())

    config, weights = build_fresh_draft(target, 5, tmp_path / "given")

    write_draft(tmp_path / "fresh", config, weights)
    head = load_file(target / "model.safetensors")["lm_head.weight"]
    assert check_draft(tmp_path / "fresh", read_target(target)) == config == given.config
    assert torch.equal(weights["lm_head.weight"], head[given.target_ids_W])
    assert torch.equal(weights["d2t"], given.weights()["d2t"])
    assert torch.equal(weights["t2d"], given.weights()["t2d"])


def test_a_fresh_draft_of_a_pruned_vocabulary_without_a_map_is_refused_with_the_way_to_get_one(tmp_path, target):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(build_draft(draft_vocab_size=11).config.to_json()))
    save_file({"d2t": torch.zeros(13, dtype=torch.int64)}, tmp_path / "other.safetensors")

    with pytest.raises(CheckpointError, match=r"is 11 of 29 and no \*.safetensors .* d2t .*; put .* or set .* to 29$"):
        build_fresh_draft(target, 0, mine)


def test_a_fresh_draft_of_another_targets_shape_is_refused_by_its_field(tmp_path, target):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(build_draft(vocab_size=31, draft_vocab_size=31).config.to_json()))

    with pytest.raises(CheckpointError, match=r"mine.json: vocab_size is 31, wanted the target's 29"):
        build_fresh_draft(target, 0, mine)


def test_a_fresh_draft_of_a_tied_target_starts_from_its_embedding(tmp_path):
    target = write_target(tmp_path / "tied", tie_word_embeddings=True)

    _, weights = build_fresh_draft(target, seed=0)

    assert torch.equal(weights["lm_head.weight"], read_embedding(target))


def test_tensors_are_found_in_shards(tmp_path, target):
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, target / f"model-{i:05d}.safetensors")

    assert torch.equal(read_embedding(target), tensors["model.embed_tokens.weight"])
    (target / "model-00000.safetensors").unlink()
    (target / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors holds .*complete the download"):
        build_fresh_draft(target, 0)


@pytest.mark.parametrize("num_layers", [2, 6])
def test_a_target_too_shallow_for_three_captures_is_refused_with_its_depth(tmp_path, num_layers):
    target = write_target(tmp_path, num_hidden_layers=num_layers)

    with pytest.raises(CheckpointError, match=f"num_hidden_layers is {num_layers}, wanted at least 7"):
        fresh_config(read_target(target))


def test_target_facts_come_from_config_json(tmp_path):
    facts = read_target(write_target(tmp_path / "a", eos_token_id=3))
    nested = tmp_path / "b"
    nested.mkdir()
    (nested / "config.json").write_text(json.dumps({"text_config": TARGET_JSON}))

    assert (facts.num_layers, facts.eos_token_ids, facts.max_position_embeddings) == (8, (3,), 128)
    assert read_target(nested).eos_token_ids == (3, 4)
