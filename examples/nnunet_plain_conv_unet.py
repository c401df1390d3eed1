"""nnU-Net's PlainConvUNet with deep supervision. pip install fastunet dynamic-network-architectures"""

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from shapes import discs
from torch import nn


def main(steps: int = 20, size: int = 64, **options: object) -> dict:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PlainConvUNet(
        input_channels=1,
        n_stages=4,
        features_per_stage=(16, 32, 64, 128),
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2),
        n_conv_per_stage=2,
        num_classes=1,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    ).to(device)

    compiled = torch.compile(model, backend="fastunet", **options)  # the one changed line

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.99, nesterov=True)
    losses = []
    for step in range(steps):
        images, masks = discs(4, size, seed=step, device=device)
        # Every level's output, each with half the weight of the one above.
        loss = sum(
            0.5**level * F.binary_cross_entropy_with_logits(y, F.interpolate(masks, size=y.shape[2:]))
            for level, y in enumerate(compiled(images))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    images, _ = discs(2, size, seed=steps, device=device)
    with torch.no_grad():
        return {"losses": losses, "result": compiled(images)[0], "expected": model(images)[0]}


if __name__ == "__main__":
    main()
