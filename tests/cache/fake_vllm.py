"""A module with the interface of vLLM 0.22 for the extraction of hidden states, which runs a tiny model of transformers.

Its states are those before the final norm, in files of the shape [tokens, layers, width] that are written beside a lock
file, and its log-probabilities are those of the whole model.
"""

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dwakd.cache.vllm import final_norm


class SamplingParams:
    def __init__(self, *, max_tokens: int, temperature: float, prompt_logprobs: int, detokenize: bool) -> None:
        assert (max_tokens, temperature, prompt_logprobs, detokenize) == (1, 0.0, 1, False)


class KVTransferConfig:
    def __init__(self, *, kv_connector: str, kv_role: str, kv_connector_extra_config: dict[str, Any]) -> None:
        assert (kv_connector, kv_role) == ("ExampleHiddenStatesConnector", "kv_producer")
        self.folder = Path(kv_connector_extra_config["shared_storage_path"])


class LLM:
    change: Any = None
    """A function that changes the states or the tokens in a file, as known errors of vLLM do."""

    def __init__(self, model, *, dtype, speculative_config, kv_transfer_config, max_model_len, **options) -> None:
        assert options["enable_chunked_prefill"] is options["enable_prefix_caching"] is False
        assert (speculative_config["method"], speculative_config["num_speculative_tokens"]) == (
            "extract_hidden_states",
            1,
        )
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        layers = speculative_config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
        assert layers == [self.model.config.num_hidden_layers]
        self.folder, self.longest, self.count = kv_transfer_config.folder, max_model_len, 0

    @torch.no_grad()
    def generate(self, prompts, params, *, use_tqdm):
        return [self._run(prompt["prompt_token_ids"]) for prompt in prompts]

    def _run(self, ids):
        assert len(ids) < self.longest
        seen = []
        hook = final_norm(self.model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        logits = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        hook.remove()
        entries = [
            {
                int(row.argmax()): SimpleNamespace(logprob=float(row.max())),
                one: SimpleNamespace(logprob=float(row[one])),
            }
            for row, one in zip(logits, ids[1:], strict=False)
        ]
        data = {"hidden_states": seen[0][:, None].clone(), "token_ids": torch.tensor(ids)}
        self.count += 1
        path = str(self.folder / f"{self.count}.safetensors")
        save_file(LLM.change(data) if LLM.change else data, path)
        Path(f"{path}.lock").touch()
        return SimpleNamespace(
            prompt_token_ids=ids, prompt_logprobs=[None, *entries], kv_transfer_params={"hidden_states_path": path}
        )


def load_hidden_states(path: str) -> dict[str, torch.Tensor]:
    assert Path(f"{path}.lock").exists()
    return load_file(path)


def install(monkeypatch: Any) -> None:
    """Let `import vllm` find this module in a test."""
    here, v1 = sys.modules[__name__], "vllm.distributed.kv_transfer.kv_connector.v1"
    modules = {"vllm": here, "vllm.config.kv_transfer": here, v1: SimpleNamespace(example_hidden_states_connector=here)}
    for name in ("vllm.config", *(v1.rsplit(".", number)[0] for number in (1, 2, 3))):
        modules[name] = types.ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
