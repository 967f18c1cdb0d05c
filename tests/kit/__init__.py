"""What the tests share: comparison, cases, strategies, the backends that run here, the compiler."""
