"""Routes, problem documents and the streaming upload."""
