"""segmentation_models_pytorch's Unet on a ResNet encoder. pip install fastunet segmentation-models-pytorch"""

import segmentation_models_pytorch as smp
import torch
from shapes import discs


def main(steps: int = 20, size: int = 64, **options: object) -> dict:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # encoder_weights="imagenet" downloads pretrained ones.
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1).to(device)

    compiled = torch.compile(model, backend="fastunet", **options)  # the one changed line

    loss_of, optimizer = smp.losses.DiceLoss("binary"), torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        images, masks = discs(4, size, seed=step, channels=3, device=device)
        loss = loss_of(compiled(images), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"Dice loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    images, _ = discs(2, size, seed=steps, channels=3, device=device)
    with torch.no_grad():
        return {"losses": losses, "result": compiled(images), "expected": model(images)}


if __name__ == "__main__":
    main()
