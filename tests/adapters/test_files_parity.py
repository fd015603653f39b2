"""Folders that `peft` itself opens and writes: the same logits, both ways."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmethods import adapters, models
from jaxmethods.adapters import S2FT, DoRA, LoRA
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft with transformers 5

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 9))
KINDS = {
    "lora": {"q_proj|up_proj": LoRA(rank=3, alpha=7.0), "down_proj": LoRA(rank=5)},
    "rslora": {"o_proj|v_proj": LoRA(rank=4, rslora=True)},
    "dora": {"q_proj": DoRA(rank=2), "o_proj|down_proj": DoRA(rank=3, alpha=1.0)},
    "s2ft": {"up_proj": S2FT(count=5, side="out"), "down_proj": S2FT(count=7), "o_proj": S2FT(count=1, unit="head")},
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request, tmp_path_factory):
    """(our module and parameters, the folder of the same model): once with biases and once without."""
    module, params = tiny.decoder(request.param)
    folder = tmp_path_factory.mktemp("base") / "m"
    models.save(folder, module, params)
    return module, params, folder


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("pairs", KINDS.values(), ids=KINDS)
def test_peft_opens_what_we_write(pairs, base, tmp_path):
    module, _, folder = base
    *_, adapted, tuned = tiny.adapted(pairs, module.config.family)
    adapters.save_peft(tmp_path / "a", adapted, tuned, base_model=str(folder))
    model = peft.PeftModel.from_pretrained(theirs(folder), str(tmp_path / "a")).eval()
    ours = models.logits(adapted, tuned, TOKENS.astype(np.int32))
    np.testing.assert_allclose(their_logits(model), ours, atol=2e-4)
    assert np.abs(their_logits(theirs(folder)) - ours).max() > 1e-2


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "use_rslora": True, "alpha_pattern": {"layers.1.self_attn.o_proj": 3}},
    {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "gate_proj"], "use_dora": True},
    {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [0, 2]},
], ids=["lora", "rslora", "dora", "some_layers"])  # fmt: skip
def test_we_open_what_peft_writes(options, base, tmp_path):
    module, params, folder = base
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(folder), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a")
    ours = models.logits(*adapters.load_peft(tmp_path / "a", module, params), TOKENS.astype(np.int32))
    np.testing.assert_allclose(ours, their_logits(model), atol=2e-4)
