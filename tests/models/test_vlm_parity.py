# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""Random tiny LLaVA-1.5 and LLaVA-OneVision models: the same logits in transformers and here, both ways."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image

from jaxmethods import generation, images, models
from jaxmethods.data.pictures import Picture, seen

ATOL = 2e-4  # float32; logits are of order 1

TEXT = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
)
EYES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
TOKEN = 90


def llava(**changes):
    vision = transformers.CLIPVisionConfig(**EYES, image_size=28, patch_size=7)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0)
    told = dict(image_token_index=TOKEN, vision_feature_layer=-2, image_seq_length=16) | changes
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, **told)
    )


def onevision(**changes):
    vision = transformers.SiglipVisionConfig(**EYES, image_size=28, patch_size=7, vision_use_head=False)
    text = transformers.Qwen2Config(**TEXT, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True)
    told = dict(
        image_token_index=TOKEN,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 84]],
        vision_aspect_ratio="anyres_max_2",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text, **told | changes)
    )


def randomised(model):
    """Large random weights: at its own initialisation most mistakes would not show."""
    torch.manual_seed(0)
    model = model.eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            plain = weight.ndim < 2
            weight.normal_(0.0, 0.3 if plain else 1.2 * weight[0].numel() ** -0.5)
            if "norm" in path and path.endswith("weight"):
                weight.add_(1.0)
    return model


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def cut(format, row):
    return format.one_crop if len(row) > 1 else format


def rows(sight, given: list[list[Image.Image]], width: int):
    """Rows of tokens with these pictures at markers between words, padded on the right; and their `Images`."""
    rng = np.random.default_rng(1)
    tokens, mask, arrays = np.zeros((len(given), width), np.int32), np.zeros((len(given), width), bool), []
    crops = max(sum(cut(sight.format, row).crops_of(*p.size) for p in row) for row in given)
    for i, row in enumerate(given):
        ids = [*rng.integers(1, 80, 3)]
        for p in row:
            ids += [sight.image_token_id] * cut(sight.format, row).tokens_of(*p.size) + [*rng.integers(1, 80, 4)]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        named = [Picture.of(p, "a row", cut(sight.format, row)) for p in row]
        arrays.append(seen(named, tokens[i] == sight.image_token_id, sight.format, crops))
    stacked = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
    return tokens, mask, models.pictures(stacked)["images"]


def normalised(sight, crops: np.ndarray) -> torch.Tensor:
    mean, std = np.float32(sight.tower.mean), np.float32(sight.tower.std)
    return torch.tensor(((crops / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))


@pytest.mark.parametrize(
    "changes", [{}, {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}], ids=["patches", "full"]
)
def test_parity_of_llava(tmp_path, changes):
    model = randomised(llava(**changes))
    model.save_pretrained(tmp_path / "theirs")
    module, params = models.load(tmp_path / "theirs")
    tokens, mask, given = rows(module.sight, [[picture(40, 28, 0), picture(28, 60, 1)], [picture(28, 28, 2)], []], 48)
    crops = np.concatenate([given.pixels[0, :2], given.pixels[1, :1]])
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask),
            pixel_values=normalised(module.sight, crops),
        ).logits.numpy()
    ours = models.logits(module, params, tokens, mask, images=given)
    np.testing.assert_allclose(np.asarray(ours)[mask], wanted[mask], atol=ATOL)

    models.save(tmp_path / "ours", module, params)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        back = again(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask),
            pixel_values=normalised(module.sight, crops),
        ).logits.numpy()
    np.testing.assert_allclose(back[mask], wanted[mask], atol=ATOL)
    reread, same = models.load(tmp_path / "ours")
    np.testing.assert_array_equal(models.logits(reread, same, tokens, mask, images=given), ours)


def test_parity_of_llava_onevision(tmp_path):
    model = randomised(onevision())
    model.save_pretrained(tmp_path / "theirs")
    module, params = models.load(tmp_path / "theirs")
    assert module.sight.format.max_crops == 2 and module.config.tie_embeddings
    given = [[picture(60, 20, 0)], [picture(80, 80, 1)], [picture(20, 25, 2), picture(30, 70, 3)]]
    width = 16 + max(sum(cut(module.sight.format, row).tokens_of(*p.size) for p in row) for row in given)
    tokens, mask, seen_by_us = rows(module.sight, given, width)
    flat = [(p, cut(module.sight.format, row)) for row in given for p in row]
    crops = [normalised(module.sight, images.prepare(p, form).crops) for p, form in flat]
    most = max(map(len, crops))
    padded = torch.stack([torch.cat([c, torch.zeros(most - len(c), *c.shape[1:])]) for c in crops])
    told = dict(
        input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask), pixel_values=padded,
        image_sizes=torch.tensor([(p.size[1], p.size[0]) for p, _ in flat]),
        batch_num_images=torch.tensor([1, 1, 2]),
    )  # fmt: skip
    with torch.no_grad():
        wanted = model(**told).logits.numpy()
    ours = models.logits(module, params, tokens, mask, images=seen_by_us)
    np.testing.assert_allclose(np.asarray(ours)[mask], wanted[mask], atol=ATOL)

    models.save(tmp_path / "ours", module, params)
    again = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(**told).logits.numpy()[mask], wanted[mask], atol=ATOL)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert processor.image_grid_pinpoints == [[28, 56], [56, 28], [56, 56], [84, 84]]


def test_parity_of_greedy_generation_with_images(tmp_path):
    """Left padding, a KV cache, pictures in the prompt: the tokens that transformers' `generate` gives."""
    model = randomised(llava())
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    module, params = models.load(tmp_path)
    tokens, mask, given = rows(module.sight, [[picture(40, 28, 0), picture(28, 60, 1)], [picture(28, 28, 2)]], 44)
    shift = [int((~m).sum()) for m in mask]
    roll = lambda x: np.stack([np.roll(row, n, axis=0) for row, n in zip(x, shift, strict=True)])
    tokens, mask = roll(tokens), roll(mask)
    given = given._replace(places=roll(given.places))
    made = generation.generate(module, params, tokens, mask, max_new_tokens=6, temperature=0.0, images=given)
    crops = np.concatenate([given.pixels[0, :2], given.pixels[1, :1]])
    theirs = model.generate(
        input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(),
        pixel_values=normalised(module.sight, crops), max_new_tokens=6, do_sample=False,
    )  # fmt: skip
    np.testing.assert_array_equal(made.tokens, theirs[:, tokens.shape[1] :].numpy())
