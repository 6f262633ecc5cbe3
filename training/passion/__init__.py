"""The PASSION method: losses, self-distillation, preference (Shi et al., ACM MM 2024)."""
