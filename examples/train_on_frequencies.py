"""A digit classifier that sees only the lowest frequencies, each with a gain that is learned. Needs scikit-learn.

An 8 x 8 digit is one block, so BlockDCT2d gives count numbers per image; its scale is a Parameter like any other.
"""

import fourfold as ff
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

digits = load_digits()  # 1797 images of 8 x 8, levels 0..16
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]  # [n, 1, 8, 8]
train_x, test_x, train_y, test_y = train_test_split(images, torch.tensor(digits.target), test_size=0.3, random_state=0)

for count in (3, 10, 24, 64):
    torch.manual_seed(0)
    freqs = ff.zigzag()[:count]
    gain = torch.nn.Parameter(torch.full((count,), 0.05))
    model = torch.nn.Sequential(
        ff.nn.BlockDCT2d(8, freqs=freqs, scale=gain, shift=-8.0),  # [n, count, 1, 1]
        torch.nn.Flatten(),
        torch.nn.Linear(count, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(train_x), train_y).backward()
        optimizer.step()
    accuracy = (model(test_x).argmax(1) == test_y).float().mean()
    print(f"{count:2} of 64 frequencies: {accuracy:.1%} of the test digits right")
