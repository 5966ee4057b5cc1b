(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const all = [...document.querySelectorAll("details.finding")];
  const shown = document.getElementById("shown");
  let texts;
  const apply = () => {
    const want = new FormData(form), words = want.get("text").trim().toLowerCase();
    if (words) texts ??= all.map((d) => d.textContent.toLowerCase());
    let count = 0;
    all.forEach((d, i) => {
      const fits = ["stage", "attack", "label"].every((k) => !want.get(k) || d.dataset[k] === want.get(k)) && (!words || texts[i].includes(words));
      d.hidden = !fits;
      count += fits;
    });
    shown.textContent = `${count} of ${all.length} shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
