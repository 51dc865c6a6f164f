"""Fill a teacher cache through vLLM, which extracts the output of the teacher's last layer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dwakd.data.encoded import EncodedSide
from dwakd.errors import UserError
from dwakd.models.head import embedding_table, output_head
from dwakd.models.specs import only_cached, resolve_spec

_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")
_CHECKED, _BLOCK = 4, 256  # tokens of each row whose log-probabilities are compared, and tokens compared at a time


class VllmEngine:
    """A teacher that runs in vLLM, with its tensor parallelism, its kernels and its quantisation.

    vLLM stores states before the final norm, so the model's own norm is applied here. The log-probabilities of some
    tokens of each row, computed from the result, must be those that vLLM gives to the prompt.

    Args:
        name: folder or hub id of the teacher; `revision` and `trust_remote_code` as in `load_causal_lm`.
        dtype: type in which vLLM computes, and of the stored states.
        max_length: most tokens of a row, with its last token.

    Raises:
        UserError: vLLM is not installed, or the checkpoint has no final norm of a known name.
    """

    chunk_tokens = 1 << 16

    def __init__(
        self, name: str, dtype: torch.dtype, max_length: int, *, revision: str | None, trust_remote_code: bool
    ) -> None:
        try:
            from vllm import LLM, SamplingParams
            from vllm.config.kv_transfer import KVTransferConfig
            from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as connector
        except ImportError:
            raise UserError(
                "dwakd cache --engine vllm requires the package vllm, 0.22 or newer: pip install vllm"
            ) from None
        location = resolve_spec(name)
        given: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.model = load_ends(location, dtype, **given)
        self.table, self.head, self._norm = embedding_table(self.model), output_head(self.model), final_norm(self.model)
        self.width, self.name, self._connector = self.head.hidden_size, name, connector
        self._folder = tempfile.TemporaryDirectory()
        layers = self.model.config.get_text_config().num_hidden_layers
        storage = {"shared_storage_path": self._folder.name}
        self._llm = LLM(
            model=location,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_length + 1,  # vLLM generates at least one token
            tensor_parallel_size=max(torch.cuda.device_count(), 1),
            enable_chunked_prefill=False,  # neither is supported together with the extraction
            enable_prefix_caching=False,
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
            },
            kv_transfer_config=KVTransferConfig(
                kv_connector="ExampleHiddenStatesConnector", kv_role="kv_producer", kv_connector_extra_config=storage
            ),
            **given,
        )
        self._params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)

    @torch.no_grad()
    def states(self, sides: Sequence[EncodedSide]) -> list[Tensor]:
        """Return the final hidden states of the response tokens of each row."""
        prompts = [{"prompt_token_ids": side.ids.tolist()} for side in sides]
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        found = [self._states(side, output) for side, output in zip(sides, outputs, strict=True)]
        self._compare(found, sides, outputs)
        return found

    def _states(self, side: EncodedSide, output: Any) -> Tensor:
        path = output.kv_transfer_params["hidden_states_path"]
        stored = self._connector.load_hidden_states(path)
        for used in (path, f"{path}.lock"):
            Path(used).unlink(missing_ok=True)
        states, ids = (stored[name][: len(side.ids)] for name in ("hidden_states", "token_ids"))
        if len(states) < len(side.ids) or ids.tolist() != side.ids.tolist():
            raise self._wrong(f"{len(states)} states for the {len(side.ids)} tokens of a row, or other tokens")
        rows = states[side.num_prompt - 1 : -1, -1]
        if not rows.isfinite().all() or (rows == 0).all(1).any():
            raise self._wrong("states that are zero, infinite or NaN")
        hidden: Tensor = self._norm(rows.to(self.head.weight.dtype))
        return hidden

    def _compare(self, found: Sequence[Tensor], sides: Sequence[EncodedSide], outputs: Sequence[Any]) -> None:
        """Raise UserError if log-probabilities of a row from its states differ from those of vLLM."""
        places = [torch.linspace(0, len(one) - 1, min(_CHECKED, len(one))).long() for one in found]
        chosen = torch.cat([one[own] for one, own in zip(found, places, strict=True)])
        theirs, targets = [], []
        for side, output, own in zip(sides, outputs, places, strict=True):
            for place in (own + side.num_prompt).tolist():
                targets.append(int(side.ids[place]))
                theirs.append(output.prompt_logprobs[place][targets[-1]].logprob)
        pairs = zip(torch.split(chosen, _BLOCK), torch.split(torch.tensor(targets)[:, None], _BLOCK), strict=True)
        own_log_probs = torch.cat([self.head.logits(rows).log_softmax(-1).gather(1, ids)[:, 0] for rows, ids in pairs])
        differences = torch.split((own_log_probs - torch.tensor(theirs)).abs(), [len(own) for own in places])
        largest = torch.stack([one.mean() for one in differences]).max().item()
        if not largest < (1e-2 if chosen.dtype == torch.float32 else 0.5):
            raise self._wrong(f"states whose log-probabilities differ by {largest:.3g} nats from vLLM's own")

    def _wrong(self, what: str) -> UserError:
        return UserError(
            f"vLLM returns {what} for {self.name}; use another version of vLLM, or build without --engine vllm"
        )


def final_norm(model: Any) -> nn.Module:
    """Return the norm between the last layer and the head; raise UserError if there is none of a known name."""
    backbone = model.base_model
    backbone = getattr(backbone, "decoder", backbone)
    norms = [norm for name in _NORMS if isinstance(norm := getattr(backbone, name, None), nn.Module)]
    if len(norms) != 1:
        raise UserError(
            f"the final norm of {model.config.model_type} is not known; build the cache without --engine vllm"
        )
    return norms[0]


def load_ends(location: str, dtype: torch.dtype, *, revision: str | None, trust_remote_code: bool) -> Any:
    """Load a model of which only embeddings, final norm and head have weights; its layers stay on the meta device."""
    folder = Path(location)
    if not folder.is_dir():
        local = only_cached(location, revision)
        patterns = ["*.json", "*.safetensors", "*.py"]
        folder = Path(snapshot_download(location, revision=revision, allow_patterns=patterns, local_files_only=local))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    ends = [model.get_input_embeddings(), final_norm(model), model.get_output_embeddings()]
    own = {id(parameter) for module in ends for parameter in module.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).to(dtype) for name in names & set(file.keys())}
    if missing := names - found.keys():
        raise UserError(f"{location} has no tensor {min(missing)}; build the cache without --engine vllm")
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model.eval()
