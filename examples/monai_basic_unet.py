"""MONAI's BasicUNet: training with MONAI's loss, then inference by its sliding window. pip install 'fastunet[train]'"""

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet
from shapes import discs


def main(steps: int = 30, size: int = 64, **options: object) -> dict:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=(8, 8, 16, 32, 64, 8)).to(device)

    compiled = torch.compile(model, backend="fastunet", **options)  # the one changed line

    loss_of, optimizer = DiceLoss(sigmoid=True), torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        images, masks = discs(4, size, seed=step, device=device)
        loss = loss_of(compiled(images), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"Dice loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    image, _ = discs(1, 3 * size, seed=steps, device=device)
    with torch.no_grad():
        result = sliding_window_inference(image, roi_size=(size, size), sw_batch_size=4, predictor=compiled)
        expected = sliding_window_inference(image, roi_size=(size, size), sw_batch_size=4, predictor=model)
    return {"losses": losses, "result": result, "expected": expected}


if __name__ == "__main__":
    main()
