"""Looking at runs: their histories as tables, the plots, and the page that tells what came out."""
