"""The program: graph, contract, surgery on it, its text and its structural verification."""
