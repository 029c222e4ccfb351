"""VG-LLM's logits beside those of transformers' own classes, put together by hand as its forward pass is."""

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from w2r2.model.conversations import byte_tokenizer
from w2r2.model.hosts import TINY_AGGREGATOR, tiny_host_config
from w2r2.model.vgllm import VGLLM, VGLLMConfig

FRAMES, ROWS, COLUMNS = 2, 3, 4  # rows and columns of tokens


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vlm = tiny_host_config("qwen2_5_vl", byte_tokenizer())
    made = VGLLM(VGLLMConfig(vlm_config=vlm, aggregator=TINY_AGGREGATOR, merger_hidden=24)).eval()
    for part in (made.vggt, made.merger):
        for parameter in part.parameters():  # fresh ones hardly tell frames apart, and have no biases
            nn.init.normal_(parameter, std=0.3)
    return made


@torch.no_grad()
@pytest.mark.parametrize("zero", [None, "after", "before"])
def test_logits_are_those_of_the_parts_put_together_by_hand(model, zero):
    special, draw = model.config.vlm_config, torch.Generator().manual_seed(1)
    image = [special.vision_start_token_id, *ROWS * COLUMNS * [special.image_token_id], special.vision_end_token_id]
    ids = torch.tensor([[30, 31, *FRAMES * image, 40, 41, 42, 50, 51]])
    pixels = torch.randn(FRAMES * 4 * ROWS * COLUMNS, 3 * 2 * 14 * 14, generator=draw)
    grid = torch.tensor(FRAMES * [[1, 2 * ROWS, 2 * COLUMNS]])
    frames = torch.rand(FRAMES, 3, 28 * ROWS, 28 * COLUMNS, generator=draw)
    options = {} if zero is None else {"shortcut": True, "zero": zero}
    ours = model(ids, pixels, grid, frames, **options).logits

    host = Qwen2_5_VLForConditionalGeneration(special).eval()
    host.load_state_dict(model.vlm.state_dict())
    layers, first = model.vggt(frames[None])
    f3d = layers[-2][0, :, first:].unflatten(1, (2 * ROWS, 2 * COLUMNS))  # VG-LLM's tap
    added = {None: lambda: model.merger(f3d), "after": lambda: 0, "before": lambda: model.merger(0 * f3d)}[zero]()
    embeds = host.get_input_embeddings()(ids)
    seen = ids == special.image_token_id
    embeds[seen] = host.model.visual(pixels, grid_thw=grid).pooler_output + added
    places, _ = host.model.get_rope_index(ids, mm_token_type_ids=seen.int(), image_grid_thw=grid)
    known = host.lm_head(host.model.language_model(inputs_embeds=embeds, position_ids=places).last_hidden_state)
    assert (ours - known).abs().max() < 1e-4 and known.std() > 0.1
    plain = host(ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=seen.int()).logits
    assert ((known - plain).abs().max() < 1e-4) == (zero == "after")
