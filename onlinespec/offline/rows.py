"""Rows from a transformers target and a data set, for those who have no server yet: what the tap would have captured.

Every assistant turn becomes a sample whose prompt is all before it. One forward pass over a conversation gives the
rows of all its turns, since hidden states depend on nothing to their right. Answers of a data set are text that the
target did not write: the draft then learns what the target would have said at each place of it. `--generate` lets
the target answer instead, so that the rows are those of its own text.

T tokens, A captured layers, D target width, V vocabulary, k teacher top-k.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError

from onlinespec.draft.config import DraftConfig, read_target
from onlinespec.draft.header import aux_layers, target_digest
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.errors import DataError
from onlinespec.gate.holdout import group_of
from onlinespec.offline.chat import ASSISTANT, Messages
from onlinespec.record.manifest import RowFacts
from onlinespec.world.hf import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

# Only repeats must fall together; a data set has no client that could choose a side.
_GROUP_KEY = b"onlinespec data set"


@dataclass(frozen=True)
class Turn:
    """One answer. tokens: prompt and answer, up to the end-of-turn token."""

    tokens: list[int]
    num_prompt_tokens: int


class TargetRows:
    """A transformers target that turns conversations into samples. `counters` says what was left out and why."""

    def __init__(
        self,
        target: Path,
        draft_config: DraftConfig,
        *,
        teacher_top_k: int,
        temperature: float,
        max_tokens: int,
        generate_tokens: int | None,
        tenant: str,
    ):
        """draft_config: of the draft the rows are for: it says what a row holds. max_tokens: longest sample.
        generate_tokens: longest answer of the target's own; None keeps the data's.

        Raises: DataError where the tokenizer has no chat template; CheckpointError where config.json lacks a field.
        """
        facts = read_target(target)
        self.counters: Counter[str] = Counter()
        self.facts = RowFacts(
            target_digest=target_digest(target),
            hidden_size=facts.hidden_size,
            aux_layers=tuple(aux_layers(draft_config, facts.num_layers)),
            teacher_top_k=teacher_top_k,
        )
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(target)
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(f"{target}: its tokenizer has no chat template; give an instruction-tuned target")
        has_gpu = torch.cuda.is_available()
        self._model = AutoModelForCausalLM.from_pretrained(target, dtype="auto" if has_gpu else torch.float32).eval()
        self._model.to("cuda" if has_gpu else "cpu")
        own_end = self._tokenizer.eos_token_id
        self._ends = {*facts.eos_token_ids, *([own_end] if isinstance(own_end, int) else [])}
        self._temperature = temperature
        self._max_tokens = min(max_tokens, facts.max_position_embeddings)
        self._generate_tokens = generate_tokens
        self._tenant = tenant
        self._num_samples = 0

    def samples(self, messages: Messages) -> Iterator[Sample]:
        """One per assistant turn that can be used, in order."""
        turns = list(self._turns(messages))
        if not turns:
            return
        if self._generate_tokens is not None:
            turns = [self._answered(turn) for turn in turns]
        group = group_of(_GROUP_KEY, self._tenant, turns[0].tokens[: turns[0].num_prompt_tokens])
        # The target's own answers are no prefixes of what the data set goes on with.
        batches = [turns] if self._generate_tokens is None else [[turn] for turn in turns]
        for batch in batches:
            rows = self._forward(batch[-1].tokens)
            for turn in batch:
                if len(turn.tokens) - turn.num_prompt_tokens < 2:
                    self.counters["answers_too_short"] += 1
                    continue
                self.counters["samples"] += 1
                yield self._sample(turn, rows, group)

    def _turns(self, messages: Messages) -> Iterator[Turn]:
        """Assistant turns whose rendering is a prefix of the whole conversation's, in text and in tokens."""
        self.counters["conversations"] += 1
        places = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not places or places[0] == 0:
            self.counters["conversations_without_an_answer"] += 1
            return
        try:
            whole = self._render(messages[: places[-1] + 1], False)
            texts = [(self._render(messages[:i], True), self._render(messages[: i + 1], False)) for i in places]
        except (TemplateError, TypeError):
            self.counters["conversations_refused_by_the_template"] += 1
            return
        tokens = self._encode(whole)
        for prompt, up_to_here in texts:
            if not (whole.startswith(up_to_here) and up_to_here.startswith(prompt)):
                self.counters["turns_the_template_renders_otherwise_in_the_whole"] += 1
                continue
            start, end = len(self._encode(prompt)), len(self._encode(up_to_here))
            if tokens[:start] != self._encode(prompt) or tokens[:end] != self._encode(up_to_here):
                self.counters["turns_whose_tokens_do_not_align"] += 1
                continue
            # What stands behind the end of turn is the template's, not the target's.
            end = next((i + 1 for i in range(start, end) if tokens[i] in self._ends), end)
            if end > self._max_tokens:
                self.counters["turns_too_long"] += 1
                continue
            yield Turn(tokens[:end], start)

    def _render(self, messages: Messages, is_prompt: bool) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def _answered(self, turn: Turn) -> Turn:
        """The same prompt with the target's greedy answer."""
        assert self._generate_tokens is not None
        prompt = turn.tokens[: turn.num_prompt_tokens]
        ids_1T = torch.tensor([prompt], device=self._model.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(1, min(self._generate_tokens, self._max_tokens - len(prompt))),
            eos_token_id=sorted(self._ends),
            pad_token_id=min(self._ends, default=0),
        )
        answered_1T = self._model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
        return Turn(answered_1T[0].tolist(), turn.num_prompt_tokens)

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captured states [T, A*D] and logits [T, V], float32 on the CPU.

        Without captured layers the draft reads the state after the last norm, which transformers gives last.

        Source: sglang 0.5.23, srt/models/llama.py, LlamaModel.forward: layer i captures what it is given, which
        is transformers' hidden_states[i].
        """
        out = self._model(torch.tensor([tokens], device=self._model.device), output_hidden_states=True)
        aux_TA = torch.cat([out.hidden_states[layer][0] for layer in self.facts.aux_layers or (-1,)], dim=-1)
        return aux_TA.float().cpu(), out.logits[0].float().cpu()

    def _sample(self, turn: Turn, rows: tuple[torch.Tensor, torch.Tensor], group: bytes) -> Sample:
        """As the assembler would have made it: no row for the last token, teachers from the last prompt row on."""
        num_tokens, k = len(turn.tokens), self.facts.teacher_top_k
        aux_TA, logits_TV = (tensor[:num_tokens] for tensor in rows)
        place_T = torch.arange(num_tokens)
        has_aux_T = place_T < num_tokens - 1
        has_teacher_T = has_aux_T & (place_T >= turn.num_prompt_tokens - 1)
        top = logits_TV.topk(k)
        self._num_samples += 1
        return Sample(
            request=self._num_samples - 1,
            tenant=self._tenant,
            num_prompt_tokens=turn.num_prompt_tokens,
            temperature=self._temperature,
            tokens_T=torch.tensor(turn.tokens),
            aux_TA=aux_TA * has_aux_T[:, None],
            has_aux_T=has_aux_T,
            teacher_ids_Tk=top.indices * has_teacher_T[:, None],
            teacher_logits_Tk=top.values * has_teacher_T[:, None],
            teacher_lse_T=logits_TV.logsumexp(-1) * has_teacher_T,
            has_teacher_T=has_teacher_T,
            verify=VerifySteps(),
            finish_reason="stop" if turn.tokens[-1] in self._ends else "length",
            # A data set has no clock: nothing in it grows old.
            started_s=0.0,
            ended_s=0.0,
            group=group,
        )
