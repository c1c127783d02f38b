"""Which SGLang flags are refused, which are served without capture, which pass."""

import pytest

from onlinespec.errors import UnsupportedError
from onlinespec.support import (
    ALIASES,
    FIXED_DEPTH_FLAGS,
    capture_refusal,
    depth_refusal,
    parse_flags,
    refuse_unsupported,
)

REFUSED = {
    "--enable-dp-attention": "--enable-dp-attention",
    "--speculative-draft-model-quantization fp8": "quantised draft",
    "--speculative-draft-load-format dummy": "load format",
    "--speculative-draft-model-path some/draft": "--draft PATH",
    "--speculative-draft-model some/draft": "--draft PATH",
    "--model-path some/model": "first argument",
    "--model some/model": "first argument",
    "--speculative-algorithm NGRAM": "--speculative-algorithm NGRAM",
    "--speculative-algo EAGLE": "--speculative-algorithm EAGLE",
    "--dp-size 2": "--dp-size 2",
    "--dp 2": "--dp-size 2",
    "--data-parallel-size=4": "--dp-size 4",
    "--pp-size 2": "--pp-size 2",
    "--pp 2": "--pp-size 2",
    "--pipeline-parallel-size 2": "--pp-size 2",
    "--dp-size two": "--dp-size two",
    "--disaggregation-mode prefill": "--disaggregation-mode prefill",
    "--disaggregation-mode=decode": "--disaggregation-mode decode",
    "--speculative-accept-threshold-single 0.9": "lossy",
    "--speculative-accept-threshold-acc=0.5": "lossy",
    "--speculative-accept-threshold-acc most": "wanted a number",
}
UNCAPTURED = {
    "--speculative-eagle-topk 4": "--speculative-eagle-topk 4",
    "--speculative-eagle-topk=2": "--speculative-eagle-topk 2",
    "--speculative-use-rejection-sampling": "--speculative-use-rejection-sampling",
    "--speculative-adaptive": "--speculative-adaptive",
    "--speculative-draft-window-size 512": "--speculative-draft-window-size",
    "--quantization fp8": "--quantization fp8",
}
PLAIN = (
    "--port 31000 --host 0.0.0.0 --tp 2 --trust-remote-code --context-length=4096 --log-level warning"
    " --speculative-num-steps 5 --speculative-algorithm eagle3 --disaggregation-mode null --dp-size 1"
    " --speculative-accept-threshold-single 1.0 --speculative-eagle-topk 1 --mem-fraction-static 0.8 --pp 1"
)


@pytest.mark.parametrize(("given", "named"), REFUSED.items())
def test_a_setting_that_is_not_supported_is_refused_by_name(given: str, named: str):
    with pytest.raises(UnsupportedError) as caught:
        refuse_unsupported(parse_flags(given.split()))

    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["--speculative-draft-model-quant fp8", "--enable-dp-att", "--disagg prefill"])
def test_an_abbreviation_cannot_smuggle_a_refused_flag_past_us(given: str):
    with pytest.raises(UnsupportedError, match=rf"{given.split()[0]}: .* write --"):
        refuse_unsupported(parse_flags(given.split()))


@pytest.mark.parametrize(("given", "named"), UNCAPTURED.items())
def test_a_setting_without_an_accept_walk_is_served_without_capture_and_named(given: str, named: str):
    flags = parse_flags(given.split())

    refuse_unsupported(flags)

    assert capture_refusal(flags).startswith(named)


def test_plain_flags_pass_and_are_captured():
    flags = parse_flags(PLAIN.split())

    refuse_unsupported(flags)

    assert capture_refusal(flags) == ""
    assert depth_refusal(flags) == ""
    assert flags.given == tuple(PLAIN.split())


@pytest.mark.parametrize("flag", FIXED_DEPTH_FLAGS)
def test_a_setting_under_which_sglang_has_one_depth_is_captured_and_named(flag: str):
    flags = parse_flags([flag])

    refuse_unsupported(flags)

    assert capture_refusal(flags) == ""
    assert depth_refusal(flags).startswith(flag)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
@pytest.mark.parametrize("form", ["{} 7", "{}=7"])
def test_an_alias_and_both_spellings_of_a_value_mean_the_same(alias: str, name: str, form: str):
    flags = parse_flags(form.format(alias).split())

    assert flags.values == {name: "7"}


def test_a_flag_that_stands_alone_has_no_value_and_reads_as_its_default():
    flags = parse_flags(["--speculative-adaptive", "--port", "1", "--speculative-eagle-topk"])

    assert flags.values == {"--speculative-adaptive": None, "--port": "1", "--speculative-eagle-topk": None}
    assert flags.integer("--speculative-eagle-topk", 1) == 1
    assert flags.get("--host", "127.0.0.1") == "127.0.0.1"


def test_no_flags_at_all_are_served_and_captured():
    flags = parse_flags([])

    refuse_unsupported(flags)

    assert flags.values == {}
    assert capture_refusal(flags) == ""


def test_a_value_that_holds_an_equals_sign_is_kept_whole():
    flags = parse_flags(["--json-model-override-args={'a=b': 1}"])

    assert flags.values == {"--json-model-override-args": "{'a=b': 1}"}
