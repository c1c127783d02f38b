"""What runs inside SGLang's scheduler process: the tap and the swap."""
