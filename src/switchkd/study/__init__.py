"""Methods side by side on a pair: a study file, its runs in processes of their own, and the tables of what came out."""
