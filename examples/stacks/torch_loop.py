"""Plain torch, no PEFT: low-rank factors trained in a loop, then projected with safelora_kernels alone."""

import torch

import safelora_kernels as sk

torch.manual_seed(0)
d_in, d_out, rank, layers = 256, 128, 8, 4
base = [torch.randn(d_out, d_in) * 0.02 for _ in range(layers)]
aligned = [w + torch.randn(d_out, d_in) * 0.002 for w in base]
lora_A = [torch.nn.Parameter(torch.randn(rank, d_in) * 0.02) for _ in range(layers)]
lora_B = [torch.nn.Parameter(torch.zeros(d_out, rank)) for _ in range(layers)]

optimizer = torch.optim.AdamW([*lora_A, *lora_B], lr=1e-2)
x, target = torch.randn(64, d_in), torch.randn(64, d_out)
for _ in range(20):
    outputs = [x @ w.T + (x @ a.T) @ b.T for w, a, b in zip(aligned, lora_A, lora_B, strict=True)]
    loss = sum(torch.nn.functional.mse_loss(y, target) for y in outputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    factors = [sk.LayerFactors(*layer) for layer in zip(aligned, base, lora_B, lora_A, strict=True)]
    projections = sk.project_layers(factors)
    cosines = torch.stack([p.cosine for p in projections])
    for b, projection, chosen in zip(lora_B, projections, sk.select_layers(cosines, num_layers=2), strict=True):
        if chosen:
            b.copy_(projection.lora_B)
print("cosines", [f"{c:.4f}" for c in cosines.tolist()])
