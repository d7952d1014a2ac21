"""SaLoRA without PEFT: a network learns a task outside the subspace of its outputs on some protected inputs."""

import torch
from torch import nn

from safelora.salora import SaLoraLinear

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
protected = torch.randn(200, 64) @ torch.randn(64, 64) * 0.2  # inputs whose outputs' directions are to stay as they are

# U of every layer: the leading right singular vectors of its outputs (less the bias) on the protected inputs.
bases, x = {}, protected
with torch.no_grad():
    for index, layer in enumerate(network):
        y = layer(x)
        if isinstance(layer, nn.Linear):
            bases[index] = torch.linalg.svd(y - layer.bias, full_matrices=False).Vh[:8].T.contiguous()
        x = y

weights = {index: network[index].weight.detach().clone() for index in bases}
for index, basis in bases.items():
    network[index] = SaLoraLinear(network[index], basis, rank=4, alpha=8.0)

inputs, targets = torch.randn(256, 64), torch.randn(256, 32)
optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
for step in range(100):
    loss = nn.functional.mse_loss(network(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 33 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

for index, basis in bases.items():
    lora_A, lora_B = network[index].factors()  # a plain LoRA with the same output
    change = network[index].scaling * lora_B @ lora_A
    print(f"layer {index}: |U'dW|/|dW| = {(basis.T @ change).norm() / change.norm():.1e}")
