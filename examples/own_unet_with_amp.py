"""A U-Net of one's own under autocast, evaluated with averaged weights: what changes after compiling is seen.

pip install fastunet
"""

import torch
import torch.nn.functional as F
from shapes import discs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class OwnUNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.top = nn.Sequential(block(1, width), block(width, width))
        self.bottom = nn.Sequential(block(width, 2 * width), block(2 * width, 2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Sequential(block(2 * width, width), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.top(x)
        low = self.bottom(F.max_pool2d(skip, 2))
        return self.last(torch.cat([skip, self.up(low)], dim=1))


def main(steps: int = 30, size: int = 64, **options: object) -> dict:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    model = OwnUNet().to(device)

    compiled = torch.compile(model, backend="fastunet", **options)  # the one changed line

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    losses = []
    for step in range(steps):
        images, masks = discs(4, size, seed=step, device=device)
        with torch.autocast(device, dtype):
            loss = F.binary_cross_entropy_with_logits(compiled(images), masks)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    images, _ = discs(2, size, seed=steps, device=device)
    with torch.no_grad():
        compiled(images)  # Prepares the trained weights; then they change.
        model.load_state_dict(averaged.module.state_dict())
        return {"losses": losses, "result": compiled(images), "expected": model(images)}


if __name__ == "__main__":
    main()
