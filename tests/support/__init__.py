"""What tests share: real servers, real crashing programs, waiting for conditions."""
