"""Text projections are found by what they receive."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attack_pipelines import WIDTH, tiny_pipeline, tiny_xl_pipeline

from immunize_ext.text_to_image.projections import (
    describe_projections,
    find_text_projections,
    linear_layers,
    text_entrances,
)


def _by_name(unet, widths):
    """What the names say, for models of diffusers."""
    return [
        name
        for name, module in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v")) and module.in_features in widths
    ]


@pytest.mark.parametrize(
    ("make", "width"), [(tiny_pipeline, WIDTH), (tiny_xl_pipeline, 2 * WIDTH)], ids=["sd", "sdxl"]
)
def test_all_blocks_are_found_and_nothing_else(make, width):
    unet = make().unet
    found = find_text_projections(unet)
    assert [p.name for p in found] == _by_name(unet, {width})
    for projection in found:
        assert projection.role == ("key" if projection.name.endswith("to_k") else "value")
        assert projection.module is unet.get_submodule(projection.name)
        assert projection.module.weight.shape == (projection.out_features, width)
        assert projection.weight_name in dict(unet.named_parameters())


def test_stacked_transformer_blocks_are_found():
    names = {p.name for p in find_text_projections(tiny_xl_pipeline().unet)}
    assert any(".transformer_blocks.1." in name for name in names)


def test_names_do_not_matter():
    from diffusers import UNet2DConditionModel

    # Text as wide as the image features: nothing but the values tells one from the other.
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    assert [p.name for p in find_text_projections(unet)] == _by_name(unet, {8})[: 2 * 4]
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    assert not any(p.module is block.attn1.to_k for p in find_text_projections(unet))


def test_nothing_is_changed():
    pipeline = tiny_pipeline()
    unet = pipeline.unet
    unet.train()
    unet.mid_block.eval()
    modes = {name: module.training for name, module in unet.named_modules()}
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    random = torch.get_rng_state()
    find_text_projections(unet)
    assert {name: module.training for name, module in unet.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_half_precision_models():
    assert len(find_text_projections(tiny_pipeline(dtype=torch.bfloat16).unet)) == 8


def test_fused_projections_are_refused_by_name_until_unfused():
    unet = tiny_pipeline().unet
    unet.fuse_qkv_projections()
    message = r"{}: .*attn\d must not be fused.*unfuse_qkv_projections"
    with pytest.raises(ValueError, match=message.format("find_text_projections")):
        find_text_projections(unet)
    with pytest.raises(ValueError, match=message.format("text_entrances")):
        text_entrances(unet)
    with pytest.raises(ValueError, match=message.format("own")):
        linear_layers("own", unet, "kv")
    unet.unfuse_qkv_projections()
    assert len(find_text_projections(unet)) == 8


def test_adapters_are_refused_by_name():
    peft = pytest.importorskip("peft")
    unet = tiny_pipeline().unet
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match=r"attn2.to_k must be a plain layer, got the adapter"):
        find_text_projections(unet)


def test_description_counts_layers_and_widths():
    found = find_text_projections(tiny_pipeline().unet)
    assert describe_projections(found) == (
        f"8 text projections (4 K, 4 V): text width {WIDTH}; rows 16 x 8"
    )
    assert describe_projections([]) == "no text projections"
