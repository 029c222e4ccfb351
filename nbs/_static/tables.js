// Cells with sentences wrap; numbers and short names do not.
for (const cell of document.querySelectorAll("article td, article th"))
  if (cell.textContent.trim().length > 30) cell.classList.add("sentence");
