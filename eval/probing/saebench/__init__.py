"""SAEBench's probing tasks: sparse probing, SCR, TPP and absorption."""
