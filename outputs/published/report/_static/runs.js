
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("#every-run table");
  if (!table) return;
  const body = table.tBodies[0];
  const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "find runs" });
  search.setAttribute("aria-label", "find runs");
  table.before(search);
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  const heads = [...table.tHead.rows[0].cells];
  const sort = (head, column) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = (row) => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [text(a), text(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
      const by = x - y;
      return (up ? 1 : -1) * (Number.isNaN(by) ? x.localeCompare(y) : by);
    };
    body.append(...[...body.rows].sort(compare));
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column));
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort(head, column));
  });
});
