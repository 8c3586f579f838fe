"""Files of every format give the change that the program which wrote them would apply."""

import peft
import pytest
import torch
from safetensors.torch import save_file
from small_adapters import tensors, write
from torch import nn

from pysteer.errors import InputError
from pysteer.weightspace import read_adapter
from pysteer.weightspace.names import parse_name

QUERY = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("name", "layer", "role", "form"),
    [
        (f"{QUERY}.lora_A.weight", QUERY, "down", "diffusers"),
        (f"{QUERY}.lora.up.weight", QUERY, "up", "diffusers"),
        (f"{QUERY.removesuffix('.to_q')}.processor.to_q_lora.down.weight", QUERY, "down", "diffusers"),
        (QUERY.removeprefix("unet.") + ".lora_B.weight", QUERY, "up", "diffusers"),
        ("base_model.model." + QUERY.removeprefix("unet.") + ".lora_B.default.weight", QUERY, "up", "peft"),
        ("lora_unet_" + QUERY.removeprefix("unet.").replace(".", "_") + ".lora_down.weight", QUERY, "down", "kohya"),
        ("lora_unet_" + QUERY.removeprefix("unet.").replace(".", "_") + ".alpha", QUERY, "alpha", "kohya"),
        (
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj", "up", "kohya",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "down", "diffusers",
        ),
        (f"{QUERY}.lora_magnitude_vector", QUERY, "magnitude", "diffusers"),
        (
            "lora_unet_down_blocks_0_resnets_1_conv_shortcut.dora_scale",
            "unet.down_blocks.0.resnets.1.conv_shortcut", "magnitude", "kohya",
        ),
    ],
)  # fmt: skip
def test_names(name, layer, role, form):
    assert parse_name(name) == (layer, role, form)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../../etc/passwd.lora_A.weight", "tensor name"),
        ("a/b.lora_A.weight", "tensor name"),
        ("unet..to_q.lora_A.weight", "tensor name"),
        ("lora_unet_mid.hada_w1_a", "kind of adapter"),
        ("lora_unet_mid.lokr_w1", "kind of adapter"),
        ("unet.conv_in.weight", "tensor name"),
    ],
)
def test_other_names_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        parse_name(name)


def test_kohya_alpha_and_convolution(tmp_path):
    """A LoCon layer with a middle factor is the convolution of its three factors; alpha / rank scales it."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 4, 1, 1, generator=generator), torch.randn(6, 3, 1, 1, generator=generator)
    mid = torch.randn(3, 3, 3, 3, generator=generator)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid,
               f"{name}.alpha": torch.tensor(6.0)}, tmp_path / "a.safetensors")  # fmt: skip
    layer = read_adapter(tmp_path / "a.safetensors").layers["unet.down_blocks.0.resnets.0.conv1"]
    x = torch.randn(2, 4, 5, 5, generator=generator)
    conv = nn.functional.conv2d
    wanted = 2.0 * conv(conv(conv(x, down), mid, padding=1), up)
    made = conv(x, layer.delta().view(6, 4, 3, 3), padding=1)
    assert layer.kernel == (3, 3)
    assert layer.scale == 2.0
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_peft_writes_what_is_read(tmp_path):
    """The change of a model that plain PEFT wrote, with alpha and r in its config."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    before = [layer.weight.detach().clone() for layer in base]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path / "adapter_model.safetensors")
    merged = model.merge_and_unload()
    for index in range(2):
        torch.testing.assert_close(before[index] + found.layers[str(index)].delta(), merged[index].weight)
    assert found.format == "peft"


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_written_and_read_again(tmp_path, form):
    first = read_adapter(write(tmp_path / "a.safetensors", 3))
    second = read_adapter(first.save(tmp_path / "b.safetensors", form))
    assert second.format == form
    for name, layer in first.layers.items():
        assert torch.equal(second.layers[name].delta(), layer.delta())


def test_dora_is_flagged_and_not_written(tmp_path):
    given = tensors(0)
    given["unet.mid_block.attentions.0.to_q.lora_magnitude_vector"] = torch.ones(5)
    save_file(given, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    assert found.notes == ("DoRA magnitudes left out",)
    assert [it.dora for it in found.layers.values()] == [True, False]
    with pytest.raises(InputError, match="DoRA"):
        found.save(tmp_path / "b.safetensors")
