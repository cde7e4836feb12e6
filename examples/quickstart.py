"""EMC2Loss in a training loop: `python examples/quickstart.py`, a few seconds on a CPU.

It is told the items' numbers, as it keeps a Markov chain for each, whose state is a negative from the whole data set.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from emc2_kernels.losses import EMC2Loss

ITEMS, PIXELS, DIM, EPOCHS = 512, 64, 32, 10


def augment(images: Tensor) -> Tensor:
    """Another view at each call: brighter or darker, with noise."""
    return images * torch.empty(len(images), 1).uniform_(0.6, 1.4) + 0.1 * torch.randn_like(images)


torch.manual_seed(0)
images = torch.rand(ITEMS, PIXELS)  # yours; here pictures of 8 x 8 random pixels
dataset = TensorDataset(images, torch.arange(ITEMS))  # an item is an image and its number
loader = DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True)  # uniform draws: what is proposed to chains
encoder = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, DIM))
loss_fn = EMC2Loss(ITEMS, DIM, temperature=0.2)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-4)

for epoch in range(1, EPOCHS + 1):
    totals = torch.zeros(2)
    for batch, index in loader:
        loss, stats = loss_fn(encoder(augment(batch)), encoder(augment(batch)), index, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals += torch.stack((stats["ntxent"], stats["mean_cosine"]))
    # The loss's own value may be negative. What compares runs is NT-Xent in the batch, which falls, and the mean cosine
    # of its embeddings, which falls to about 0; one that goes to 1 is collapse.
    ntxent, cosine = (totals / len(loader)).tolist()
    print(f"epoch {epoch:2}: NT-Xent {ntxent:.3f}, mean cosine {cosine:.3f}")
