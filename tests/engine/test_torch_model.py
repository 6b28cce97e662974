"""Loading: which kernel multiplies a single row, as decode's are."""

from __future__ import annotations

import torch

from mooncake.engine.torch.model import RowLinear, use_row_kernel


def test_the_row_kernel_is_taken_by_shape_and_gives_the_same() -> None:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8, bias=False), torch.nn.Linear(8, 16))
    one, two = torch.rand(1, 1, 8), torch.rand(1, 2, 8)
    with torch.inference_mode():
        expected = layers(one), layers(two)
    asked: list[torch.Size] = []

    def tall(weight: torch.Tensor) -> bool:
        asked.append(weight.shape)
        return weight.shape[0] > weight.shape[1]

    use_row_kernel(layers, tall)
    assert asked == [(16, 8), (8, 16)]
    assert [type(layer) is RowLinear for layer in layers] == [True, False, True]
    with torch.inference_mode():
        torch.testing.assert_close((layers(one), layers(two)), expected)
