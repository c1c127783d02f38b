"""The whole config schema: frozen structs, bounds in the types, one line per field.

Defaults live here and nowhere else; `configs/default.yaml` is generated from them. `resolve` reads files and
overrides into it, `explain` says each field's line, bounds and origin.
"""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0.0)]
Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
OpenOrWhole = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]


_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc")


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A part of the config; unknown fields are errors."""


class CaptureConfig(Section, frozen=True):
    """What the tap takes out of the server, and what it may cost."""

    enabled: bool = True
    """take rows at all; a request can also refuse with extra_body custom_params {"onlinespec": {"capture": false}}"""
    teacher_top_k: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    """target logits kept per row, beside their logsumexp"""
    queue_bytes: Positive = 512 * 2**20
    """bytes of rows that may wait in the server for the sidecar, a pass whole; beyond it they are dropped, counted"""
    ring_bytes: Positive = 256 * 2**20
    """bytes of pinned memory for passes between device and sender, two full prefill chunks where those are more; a pass
    that finds no room is dropped and counted (8192 tokens of an 8B target are 200 MB in bfloat16, half in float8)"""
    row_dtype: Literal["auto", "float8"] = "auto"
    """hidden states as they leave the server: auto: as the target computes them; float8: e4m3 with one scale a row, for
    half the bytes of bfloat16 and a relative error of up to 1/16 a value"""
    device_reserve_bytes: NonNegative = 2 * 2**30
    """device memory left free at start; a resident version for swaps that would take of it waits in pinned memory"""
    fuse_faults: Positive = 5
    """faults of ours inside the server after which capture switches itself off"""
    fuse_retry_s: PositiveFloat = 60.0
    """seconds after which an open fuse tries again"""


class BufferConfig(Section, frozen=True):
    """What the trainer remembers. RAM only; nothing readable is written to disk."""

    recent_samples: Positive = 64
    """newest training requests kept; of more, those drawn leave first, then the shortest"""
    reservoir_samples: NonNegative = 512
    """older requests kept as a uniform sample of all that left the recent window"""
    replay_frac: Fraction = 0.5
    """share of a batch drawn from the reservoir once it holds anything"""
    num_clusters: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    """task clusters (online k-means on pooled hidden states) the reservoir keeps in equal shares; 1 for none"""
    accept_threshold: NonNegativeFloat = 0.0
    """a request whose live accept length is below this is a failure case; 0 for none"""
    failure_frac: Fraction = 0.5
    """share of a batch's new requests taken from failure cases while there are any"""
    min_failure_cases: NonNegative = 0
    """failure cases that must have come before a round of training starts; 0 trains whenever requests come"""
    prefix_cache_bytes: NonNegative = 64 * 2**20
    """bytes of prompt rows kept to complete requests whose prefix the server had cached"""
    open_bytes: Positive = 2**30
    """bytes of rows of requests that have not ended; beyond it the request that holds most is given up and counted"""
    max_sequence_tokens: Positive = 2048
    """longest sample trained on; a longer one keeps its last tokens"""
    max_bytes: Positive = 4 * 2**30
    """bytes of training rows kept, recent and reservoir together; beyond it the reservoir shrinks, then the window"""
    ttl_s: PositiveFloat = 3600.0
    """seconds after which a captured request is forgotten"""

    def __post_init__(self) -> None:
        if self.min_failure_cases and not self.accept_threshold:
            raise ValueError(
                "min_failure_cases waits for failure cases and accept_threshold is 0, which makes none; set it"
            )


class TrainerConfig(Section, frozen=True):
    """The loss, the optimizer and the unroll."""

    enabled: bool = True
    """train at all; off, the sidecar captures and reports only"""
    unroll_steps: Annotated[int, msgspec.Meta(ge=1, le=8)] = 4
    """draft steps unrolled in training"""
    loss: Literal["kl", "reverse_kl", "hard"] = "kl"
    """kl: KL(target || draft) at the verifier's temperature; reverse_kl: the other way; hard: the target's argmax"""
    accept_frac: Fraction = 0.0
    """share of the expected accepted length in the loss once it is ramped up; the rest is `loss`"""
    accept_ramp_steps: NonNegative = 200
    """optimizer steps over which that share rises from 0, also after a change of the loss"""
    step_weights: Literal["decay", "reach"] = "decay"
    """weight of unroll step k: loss_decay ** k, or the measured share of rows whose first k drafted tokens matched"""
    loss_decay: OpenOrWhole = 0.8
    """weight of unroll step k is loss_decay ** k"""
    batch_requests: Positive = 2
    """new requests per optimizer step; replayed ones come on top"""
    accumulation: Positive = 1
    """batches per optimizer step"""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon on matrices, AdamW on lm_head and norms; adamw: AdamW on all"""
    muon_lr: PositiveFloat = 0.03
    """peak learning rate of the matrices (Muon)"""
    adamw_lr: PositiveFloat = 2e-3
    """peak learning rate of what AdamW trains"""
    weight_decay: NonNegativeFloat = 0.0
    """decoupled weight decay of matrices"""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """learning rate after the warm-up: constant; cosine to min_lr_frac; wsd: constant, then a linear decay to it"""
    schedule_steps: Positive = 10_000
    """optimizer steps a cosine or wsd schedule spans; after them the rate stays at min_lr_frac"""
    decay_frac: Fraction = 0.2
    """last share of schedule_steps in which wsd decays"""
    min_lr_frac: Fraction = 0.1
    """share of the peak learning rate a schedule ends at"""
    ema_decay: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.95
    """candidates are an exponential moving average of the weights over about 1 / (1 - ema_decay) steps; 0 for none"""
    warmup_steps: NonNegative = 5
    """optimizer steps of linear warm-up"""
    clip_norm: PositiveFloat = 1.0
    """largest global gradient norm"""
    kv_mode: Literal["auto", "free", "projections", "stable"] = "auto"
    """frozen, so that draft KV in the server outlives a swap: free: nothing; projections: k_proj, v_proj; stable: all
    that makes K and V; auto: projections of a draft that came trained, nothing of an untrained one, nothing offline"""
    kv_free_steps: NonNegative = 0
    """optimizer steps of an untrained draft before projections or stable freeze; adapters never touch what is frozen"""
    lora_rank: NonNegative = 0
    """rank of the adapters trained instead of the matrices, merged on publish; 0 trains the matrices themselves"""
    lora_alpha: PositiveFloat = 16.0
    """an adapter counts lora_alpha / lora_rank times"""
    lora_targets: Names = _LORA_TARGETS
    """matrices that get an adapter; everything else is frozen"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of forward, backward and Muon, over float32 masters; auto: bfloat16 where the device has instructions for it"""
    checkpoint_activations: bool = False
    """recompute activations of an unroll step in the backward pass: less memory, a third more time"""
    compile: bool = False
    """torch.compile the draft's unroll; wants a C++ compiler on a CPU"""
    passes: Positive = 2
    """times each new request is drawn; more is learned from each, and costs as much more"""
    new_task_passes: Positive = 4
    """at least so often for the first new_task_requests requests of a task cluster: there is most to learn from them"""
    new_task_requests: Annotated[int, msgspec.Meta(ge=0, le=500)] = 100
    """requests for which a task cluster counts as new, up to 500; 0 for none"""
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """seed of fresh weights and of the sampling of batches"""
    device: Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """where the draft is trained and candidates are walked: cpu, cuda or cuda:N, the server's GPU or another"""
    max_memory_gb: NonNegativeFloat = 0.0
    """most GPU memory of the sidecar, in 2**30 bytes; what wants more ends it, and it starts again; 0: no bound"""
    attention: Literal["auto", "math", "flex"] = "auto"
    """of the unroll: math keeps masks and probabilities in memory; flex, compiled, neither; auto: flex on cuda"""
    num_threads: Positive = 1
    """CPU threads of the trainer"""
    checkpoint_s: PositiveFloat = 30.0
    """seconds between checkpoints of the trainer's state"""

    def __post_init__(self) -> None:
        if self.attention == "flex" and self.device == "cpu":
            raise ValueError("attention is flex with device cpu, where it has no gradients; set attention to auto")
        if self.max_memory_gb and self.device == "cpu":
            raise ValueError(
                f"max_memory_gb is {self.max_memory_gb:g} with device cpu, which has no such bound; set it to 0"
            )
        if self.loss == "hard" and self.accept_frac:
            raise ValueError(
                f"accept_frac is {self.accept_frac} with loss hard, whose argmax it would take for the target's"
                " distribution; set loss to kl"
            )


class PaceConfig(Section, frozen=True):
    """How much may be trained now."""

    duty_frac: OpenOrWhole = 1.0
    """largest share of wall time spent in optimizer steps"""
    busy_requests: NonNegative = 0
    """running requests in the server from which on training pauses; 0 never pauses"""
    calm_duty_frac: Fraction = 1.0
    """share of duty_frac that remains while nothing has drifted and candidates bring no gain"""
    calm_capture_frac: OpenOrWhole = 1.0
    """share of requests captured in such a calm; all are captured otherwise"""


class DriftConfig(Section, frozen=True):
    """When traffic counts as having moved away from the draft."""

    enabled: bool = True
    """watch acceptance per position and task cluster"""
    slack_frac: Fraction = 0.05
    """drop in acceptance per verify step that is tolerated (the delta of Page-Hinkley)"""
    threshold: PositiveFloat = 20.0
    """accumulated drop, in verify steps times acceptance, that counts as drift (the lambda of Page-Hinkley); it is
    multiplied by how much wider requests spread than independent steps would"""
    min_steps: Positive = 200
    """verify steps of a cluster before it can drift"""


class GateConfig(Section, frozen=True):
    """When a candidate becomes the incumbent."""

    holdout_frac: OpenFraction = 0.1
    """share of conversations that never train, so that their repeats and later turns judge too"""
    judge_new: bool = True
    """let every other conversation judge at its first turn, before it trains"""
    test: Literal["betting", "bernstein"] = "betting"
    """e-process a promotion rests on; bernstein is the conservative one: more requests, fewer lucky runs"""
    alpha: OpenFraction = 0.05
    """largest chance of promoting a candidate that is no improvement; the budget below may lower it"""
    max_false_promotions_per_day: PositiveFloat = 1.0
    """promotions of no improvement expected per day, at most; renews with time, one day's worth can be saved up"""
    max_candidates_per_hour: Positive = 60
    """races that may begin in an hour"""
    min_gain_tokens: NonNegativeFloat = 0.01
    """mean gain in accept length a candidate must be shown to exceed"""
    gain_clip_tokens: PositiveFloat = 1.0
    """most that one request's difference counts for, either way: the wider, the more requests a proof asks"""
    candidate_steps: Positive = 40
    """optimizer steps between two candidates; one is judged at a time"""
    min_requests: Positive = 8
    """held-out requests, each of another conversation, that a promotion needs at least"""
    min_span_s: NonNegativeFloat = 5.0
    """seconds between the first and the last start of a request that counted which a promotion needs at least; raise it
    to minutes where traffic comes in bursts"""
    max_requests: Positive = 1000
    """held-out requests after which an undecided candidate is dropped"""
    futility_requests: Positive = 24
    """held-out requests from which on a candidate is dropped whose mean gain lies below min_gain_tokens by a standard
    error"""
    stall_requests: Positive = 12
    """last held-out requests, at least, whose pace must promise a promotion in time; else a newer candidate goes on"""
    patience_requests: Positive = 64
    """held-out requests, at level alpha, in which a race must promise a promotion: doubles with each cut short, up to
    max_requests, and starts again after a quick promotion or drift"""
    slice_tolerance_tokens: NonNegativeFloat = 0.2
    """loss in accept length that a candidate may bring to a slice: tenant, task cluster, answer length, temperature"""
    slice_min_frac: OpenFraction = 0.25
    """share of a race's requests from which on a slice must be shown to lose less than that"""
    slice_alpha: OpenFraction = 0.1
    """largest chance of promoting a candidate that loses more on such a slice, and of refusing one that loses less"""
    max_missing_frac: Fraction = 0.5
    """share of prompt rows a judged request may lack (a prefix cached before the sidecar started)"""
    max_race_s: PositiveFloat = 3600.0
    """seconds after which an undecided race is given up for a newer candidate"""

    def __post_init__(self) -> None:
        if self.max_requests < self.min_requests:
            raise ValueError(f"max_requests is {self.max_requests}, wanted at least min_requests, {self.min_requests}")
        if self.gain_clip_tokens <= (least := max(self.min_gain_tokens, self.slice_tolerance_tokens)):
            wanted = f"more than min_gain_tokens and slice_tolerance_tokens, {least:g}"
            raise ValueError(f"gain_clip_tokens is {self.gain_clip_tokens:g}, wanted {wanted}")


class CanaryConfig(Section, frozen=True):
    """Whether a candidate that won its race hurts in service: both drafts alternate in live traffic."""

    enabled: bool = True
    """try a candidate in live traffic before it is promoted"""
    block_steps: Annotated[int, msgspec.Meta(ge=3)] = 8
    """decode steps of a block; a pair is one block of each draft, in coin-tossed order"""
    alpha: OpenFraction = 0.05
    """largest chance that one worse by harm_tolerance_tokens passes, and that a harmless one is stopped for harm"""
    harm_tolerance_tokens: PositiveFloat = 0.1
    """loss in live accept length that still counts as harmless; a smaller one takes more pairs to show"""
    max_step_cost_ratio: Annotated[float, msgspec.Meta(gt=1.0)] = 1.1
    """seconds per decode step of the candidate over those of the incumbent that a pass must be shown to stay below"""
    min_pairs: Positive = 8
    """pairs a pass needs at least"""
    max_pairs: Positive = 400
    """pairs after which an undecided candidate is refused"""
    max_s: PositiveFloat = 600.0
    """seconds without a complete pair after which the canary is withdrawn"""

    def __post_init__(self) -> None:
        if self.max_pairs < self.min_pairs:
            raise ValueError(f"max_pairs is {self.max_pairs}, wanted at least min_pairs, {self.min_pairs}")


class GuardConfig(Section, frozen=True):
    """When a promoted draft is rolled back."""

    enabled: bool = True
    """watch the draft in service and roll it back where harm is shown"""
    false_alarm_requests: Positive = 10_000_000
    """requests a harmless version serves, in the mean and at least, before it is rolled back by luck; the chance that
    it happens within n requests is at most n / false_alarm_requests"""
    tolerance_tokens: NonNegativeFloat = 0.1
    """loss of shadow accept length against its parent that is no harm"""
    gain_clip_tokens: PositiveFloat = 1.0
    """a request's gain over the parent counts as this at most: a few lucky ones cannot hide many losses"""
    clean_tolerance_tokens: NonNegativeFloat = 0.1
    """loss of live accept length against the shadow that is no harm, where all KV is the version's own"""
    aged_tolerance_tokens: NonNegativeFloat = 0.3
    """the same where older versions left KV behind, which costs by itself"""
    excess_clip_tokens: PositiveFloat = 0.25
    """live above shadow counts as this at most; what is below it needs more requests to trip"""
    renew_lag_tokens: NonNegativeFloat = 0.1
    """mean loss on older drafts' KV from which on cached prefixes are computed anew, once a version; 0 never"""


class FloorConfig(Section, frozen=True):
    """When speculation pays. Where it does not, the draft's depth goes to 0 and capture goes on."""

    enabled: bool = False
    """set the server's draft depth by measured cost; a depth of 0 is prepared beside the full one, which costs
    start-up time, and on a GPU the memory of a second set of CUDA graphs"""
    min_cost_steps: Positive = 8
    """decode steps that a cost needs to count as measured"""
    cost_window_steps: Positive = 128
    """decode steps in which a measured cost loses all but 1/e of its weight to newer ones"""
    cost_max_age_s: PositiveFloat = 300.0
    """seconds after which a cost no longer counts as measured"""
    min_accept_steps: Positive = 200
    """verify steps of the shadow walk that an accept length needs to count as known"""
    accept_window_steps: Positive = 1000
    """verify steps in which a measured accept length loses all but 1/e of its weight"""
    hysteresis_frac: OpenFraction = 0.1
    """share by which accept length must miss or beat the break-even before the depth changes"""
    min_dwell_s: PositiveFloat = 30.0
    """seconds between two changes of depth at least, probes not counted; doubles with changes in quick succession"""
    max_dwell_s: PositiveFloat = 480.0
    """longest such time"""
    probe_steps: Positive = 16
    """decode steps at the other depth that a probe of its cost takes"""
    probe_every_s: PositiveFloat = 30.0
    """seconds between the starts of two probes at least; depth changes on no older cost of the other depth"""
    probe_frac: Annotated[float, msgspec.Meta(gt=0.0, le=0.5)] = 0.05
    """largest share of time spent in probes: after a slow one the next waits longer than probe_every_s"""

    def __post_init__(self) -> None:
        if self.probe_steps < self.min_cost_steps:
            raise ValueError(
                f"probe_steps is {self.probe_steps}, wanted at least min_cost_steps, {self.min_cost_steps}"
            )
        if self.max_dwell_s < self.min_dwell_s:
            raise ValueError(f"max_dwell_s is {self.max_dwell_s}, wanted at least min_dwell_s, {self.min_dwell_s}")


class VersionsConfig(Section, frozen=True):
    """How many drafts are kept on disk."""

    keep_last: Positive = 8
    """newest versions kept; the incumbent, its parent, what a rollback returns to and a pin are always kept"""
    milestone_every: Positive = 10
    """each so many promoted versions one is a milestone, kept beside the newest"""
    keep_milestones: NonNegative = 8
    """newest milestones kept"""
    min_free_bytes: NonNegative = 2**30
    """free bytes on the disk below which even kept versions are deleted, the oldest first; 0 for never"""


class RecordConfig(Section, frozen=True):
    """What `onlinespec record` writes, where it is asked to."""

    shard_bytes: Positive = 64 * 2**20
    """bytes of rows after which a shard is closed and a new one begun"""


class SupervisorConfig(Section, frozen=True):
    """How `serve` looks after its two processes."""

    sidecar: bool = True
    """start the trainer beside the server; off, `python -m onlinespec.sidecar RUN_DIR` is yours to start"""

    ready_timeout_s: PositiveFloat = 600.0
    """seconds the server may take to become ready"""
    stop_timeout_s: PositiveFloat = 30.0
    """seconds a process may take to stop before it is killed"""
    restart_backoff_s: PositiveFloat = 1.0
    """first pause before a dead sidecar is started again; doubles to restart_backoff_max_s"""
    restart_backoff_max_s: PositiveFloat = 30.0
    """longest such pause"""


class Config(Section, frozen=True):
    """The root."""

    capture: CaptureConfig = CaptureConfig()
    buffer: BufferConfig = BufferConfig()
    trainer: TrainerConfig = TrainerConfig()
    pace: PaceConfig = PaceConfig()
    drift: DriftConfig = DriftConfig()
    gate: GateConfig = GateConfig()
    canary: CanaryConfig = CanaryConfig()
    guard: GuardConfig = GuardConfig()
    floor: FloorConfig = FloorConfig()
    record: RecordConfig = RecordConfig()
    versions: VersionsConfig = VersionsConfig()
    supervisor: SupervisorConfig = SupervisorConfig()

    def __post_init__(self) -> None:
        if not self.pace.calm_duty_frac and not self.drift.enabled:
            raise ValueError("pace.calm_duty_frac is 0 with drift.enabled false: a calm would never end; change one")
