"""Speed beside error, against peers in the same run; results are committed in results/."""
