"""The transformer pieces: attention against its equation."""

import torch

from models.transformer import SelfAttention, attention_weights


def test_self_attention_is_the_softmax_of_scaled_products_times_the_values():
    torch.manual_seed(1)
    attention = SelfAttention(width=12, heads=3, dropout=0.1).eval()
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ rows.T for rows in attention.qkv.weight.chunk(3))
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(attention_weights(q[..., part], k[..., part]), weights)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))
