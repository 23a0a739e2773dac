'use strict';
// The gallery's behaviour. Everything that others wrote is put in as text, never as HTML; pictures
// are taken out of the page's own data when they come near the screen.
(() => {
  const AT_ONCE = 24;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId('data').textContent);
  const {columns, questions} = data;
  const list = byId('questions');
  const dialog = byId('picture');
  const controls = {};
  for (const name of ['search', 'category', 'subcategory', 'split', 'show', 'sort', 'by', 'k']) {
    controls[name] = byId(name);
  }

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Values.

  const mean = (values) => {
    const scored = (values || []).filter((value) => value !== null);
    return scored.length ? scored.reduce((a, b) => a + b, 0) / scored.length : null;
  };
  for (const question of questions) question.means = question.values.map(mean);

  const shown = (value, sign) => {
    if (value === null) return 'unscored';
    const scaled = data.percent ? 100 * value : value;
    const digits = data.binary && data.images === 1 ? 0 : data.digits;
    return (sign && scaled > 0 ? '+' : '') + scaled.toFixed(digits) + (data.percent ? ' %' : '');
  };
  const place = (value) =>
    Math.max(0, Math.min(1, (value - data.span[0]) / (data.span[1] - data.span[0] || 1)));
  const judged = (value) => (!data.binary || value === null ? '' : value >= 0.5 ? 'right' : 'wrong');
  const describe = (value) =>
    value === null ? 'unscored' : data.binary ? (value >= 0.5 ? '✓' : '✗') : shown(value);

  // What is asked for, kept in the address so that it can be passed on.

  const defaults = {};
  for (const [name, control] of Object.entries(controls)) {
    if (control) defaults[name] = control.value;
  }
  const boxes = [...document.querySelectorAll('#columns input')];
  const usual = boxes.filter((box) => box.checked).map((box) => box.value).join('.');

  const readAddress = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const [name, control] of Object.entries(controls)) {
      if (!control) continue;
      control.value = asked.get(name) ?? defaults[name];
      if (control.value === '' && name !== 'search') control.value = defaults[name];
    }
    const chosen = (asked.get('columns') ?? usual).split('.');
    for (const box of boxes) box.checked = chosen.includes(box.value);
  };

  const writeAddress = () => {
    const asked = new URLSearchParams();
    for (const [name, control] of Object.entries(controls)) {
      if (control && control.value !== defaults[name]) asked.set(name, control.value);
    }
    const chosen = visible().join('.');
    if (chosen !== usual) asked.set('columns', chosen);
    const hash = asked.toString();
    try {
      history.replaceState(null, '', hash ? `#${hash}` : '#');
    } catch {
      // Some browsers keep files from changing their address; nothing else depends on it.
    }
  };

  const visible = () => boxes.filter((box) => box.checked).map((box) => Number(box.value));
  const value = (name) => (controls[name] ? controls[name].value : '');

  const words = (question) =>
    [question.id, question.category, question.subcategory, question.explanation,
     ...Object.values(question.prompts)].join('\n').toLocaleLowerCase();

  const chosenRows = () => {
    const by = Number(value('by'));
    const first = columns.findIndex((column) => column.condition === columns[by].condition);
    const needles = value('search').toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const gain = (question) =>
      question.means[by] === null || question.means[first] === null
        ? null : question.means[by] - question.means[first];
    const rows = [...questions.keys()].filter((row) => {
      const question = questions[row];
      for (const name of ['category', 'subcategory', 'split']) {
        if (value(name) && question[name] !== value(name)) return false;
      }
      const show = value('show');
      if (show === 'unscored' && !question.values.some((v) => v && v.includes(null))) return false;
      if (show === 'gained' && !(gain(question) > 0)) return false;
      if (show === 'lost' && !(gain(question) < 0)) return false;
      if (!needles.length) return true;
      const text = words(question);
      return needles.every((needle) => text.includes(needle));
    });
    const [key, direction] = {
      worst: [(q) => q.means[by], 1], best: [(q) => q.means[by], -1],
      gain: [gain, -1], loss: [gain, 1],
    }[value('sort')] || [null, 1];
    if (!key) return rows;
    // What has no score cannot be ranked: it comes last.
    const rank = (row) => {
      const found = key(questions[row]);
      return found === null ? Infinity : direction * found;
    };
    return rows.map((row) => [rank(row), row])
      .sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] < b[0] ? -1 : 1))
      .map(([, row]) => row);
  };

  // Pictures come out of the page's own data.

  const opened = new Map();
  const picturesOf = (row) => {
    if (!opened.has(row)) opened.set(row, JSON.parse(byId(`pictures-${row}`).textContent));
    return opened.get(row);
  };
  const source = (row, column, k) => {
    const found = picturesOf(row).shown[column];
    return found && found[k] ? data.kinds[found[k][0]] + found[k].slice(1) : null;
  };
  const fill = (image, row, column, k) => {
    const address = source(row, column, k);
    if (address) image.src = address;
    image.classList.toggle('small', data.small);
  };

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      const row = Number(entry.target.dataset.row);
      for (const image of entry.target.querySelectorAll('img[data-column]')) {
        fill(image, row, Number(image.dataset.column), Number(image.dataset.k));
      }
      for (const image of entry.target.querySelectorAll('img.target')) {
        image.src = data.kinds[picturesOf(row).target[0]] + picturesOf(row).target.slice(1);
        image.classList.toggle('small', data.small);
      }
    }
  }, {rootMargin: '900px 0px'});

  // One question.

  const figure = (row, column, k) => {
    const question = questions[row];
    const number = question.values[column] ? question.values[column][k] : null;
    const frame = make('figure');
    const button = make('button', 'view');
    button.type = 'button';
    button.dataset.column = column;
    if (data.scored) button.dataset.judged = judged(number);
    const image = make('img');
    image.alt = '';
    image.decoding = 'async';
    image.dataset.column = column;
    image.dataset.k = k;
    const title = columns[column].model;
    const score = data.scored ? `, ${describe(number)}` : '';
    button.setAttribute('aria-label', `${title}, ${columns[column].condition} prompt${score}: enlarge`);
    button.append(image);
    button.addEventListener('click', () => enlarge(row, column, k));
    const caption = make('figcaption');
    const line = make('div', 'name');
    line.append(make('span', '', title));
    if (data.scored) {
      const kind = number === null ? 'unscored' : judged(number);
      line.append(make('span', `value ${kind}`, describe(number)));
    }
    caption.append(line);
    if (data.scored && number !== null && !data.binary) {
      const gauge = make('div', 'gauge');
      const bar = make('i');
      bar.style.setProperty('--t', place(number));
      gauge.append(bar);
      caption.append(gauge);
    }
    const said = question.says[column] && question.says[column][k];
    if (said) caption.append(make('div', 'said', said));
    frame.append(button, caption);
    return frame;
  };

  const about = (question) => {
    const box = make('div');
    const tags = make('div', 'tags');
    for (const text of [question.split, question.category, question.subcategory, `#${question.id}`]) {
      if (text) tags.append(make('span', 'tag', text));
    }
    box.append(tags, make('h3', '', question.prompts.implicit));
    for (const [condition, prompt] of Object.entries(question.prompts)) {
      if (condition === 'implicit') continue;
      const other = make('p', 'other');
      other.append(make('b', '', condition), prompt);
      box.append(other);
    }
    return box;
  };

  const item = (row) => {
    const question = questions[row];
    const entry = make('li', 'question');
    entry.tabIndex = -1;
    entry.dataset.row = row;
    const text = about(question);
    if (question.explanation) {
      const more = make('details');
      more.append(make('summary', '', 'What a right picture shows'), make('p', '', question.explanation));
      text.append(more);
    }
    const shelves = make('div', 'shelves');
    if (question.target) {
      const shelf = make('div', 'shelf answer');
      const frame = make('figure');
      const image = make('img', 'target');
      image.alt = 'A right answer';
      frame.append(image);
      shelf.append(make('h4', '', 'A right answer'), frame);
      shelves.append(shelf);
    }
    const k = Number(value('k') || 0);
    const chosen = visible();
    for (const condition of data.conditions) {
      const mine = chosen.filter((column) => columns[column].condition === condition && question.values[column]);
      if (!mine.length) continue;
      const shelf = make('div', 'shelf');
      const pictures = make('div');
      pictures.append(...mine.map((column) => figure(row, column, k)));
      shelf.append(make('h4', '', `Drawn of the ${condition} prompt`), pictures);
      shelves.append(shelf);
    }
    entry.append(text, shelves);
    near.observe(entry);
    return entry;
  };

  // The list, a part at a time.

  let rows = [];
  let made = 0;
  const more = () => {
    const upTo = Math.min(rows.length, made + AT_ONCE);
    for (; made < upTo; made++) list.append(item(rows[made]));
  };
  const end = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) more();
  }, {rootMargin: '1500px 0px'});
  end.observe(byId('end'));

  const refresh = () => {
    rows = chosenRows();
    made = 0;
    // Few columns leave room for large pictures.
    const across = visible().length;
    const width = data.small ? 8 : across <= 3 ? 15 : across <= 5 ? 12 : 10;
    list.style.setProperty('--picture', `${width}rem`);
    near.disconnect();
    list.replaceChildren();
    more();
    // It looks again only if it is asked again.
    end.unobserve(byId('end'));
    end.observe(byId('end'));
    byId('count').textContent = rows.length === questions.length
      ? `${questions.length} prompts` : `${rows.length} of ${questions.length} prompts`;
    byId('nothing').hidden = rows.length > 0;
    document.documentElement.dataset.ready = 'true';
  };
  const changed = () => {
    writeAddress();
    refresh();
  };

  // One picture, large; the arrows go from model to model in place, and from prompt to prompt.

  let current = null;
  const enlarge = (row, column, k) => {
    current = {row, column, k};
    const question = questions[row];
    const image = byId('large');
    image.removeAttribute('src');
    fill(image, row, column, k);
    image.alt = `${columns[column].model}: ${question.prompts[columns[column].condition]}`;
    const facts = byId('facts');
    const strip = make('div', 'strip');
    for (const [index, other] of columns.entries()) {
      if (!question.values[index]) continue;
      const button = make('button');
      button.type = 'button';
      button.setAttribute('aria-current', index === column);
      const number = question.values[index][k] ?? null;
      button.append(make('span', '', `${other.model}, ${other.condition}`));
      if (data.scored) {
        const kind = number === null ? 'unscored' : judged(number);
        button.append(make('span', `value ${kind}`, describe(number)));
      }
      button.addEventListener('click', () => enlarge(row, index, k));
      strip.append(button);
    }
    const body = about(question);
    if (question.explanation) {
      const told = make('p', 'other');
      told.append(make('b', '', 'What a right picture shows'), question.explanation);
      body.append(told);
    }
    const file = make('a', '', 'The file itself');
    const found = picturesOf(row).files[column];
    file.href = found && found[k] ? found[k].split('/').map(encodeURIComponent).join('/') : '#';
    facts.replaceChildren(body, strip, file);
    if (!dialog.open) dialog.showModal();
  };
  const step = (across, down) => {
    const {row, column, k} = current;
    if (across) {
      const there = [...columns.keys()].filter((index) => questions[row].values[index]);
      const next = there[(there.indexOf(column) + across + there.length) % there.length];
      enlarge(row, next, k);
      return;
    }
    const at = rows.indexOf(row) + down;
    if (at < 0 || at >= rows.length) return;
    const next = questions[rows[at]].values[column] ? column : questions[rows[at]].values.findIndex(Boolean);
    while (made <= at) more();
    enlarge(rows[at], next, k);
  };
  byId('close').addEventListener('click', () => dialog.close());
  byId('previous').addEventListener('click', () => step(-1, 0));
  byId('next').addEventListener('click', () => step(1, 0));
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener('close', () => {
    const entry = list.querySelector(`[data-row="${current.row}"]`);
    const button = entry && entry.querySelector(`.view[data-column="${current.column}"]`);
    (button || entry || list).focus();
  });

  const walk = (by) => {
    const entries = [...list.children];
    const at = entries.findIndex((entry) => entry.contains(document.activeElement));
    const next = at < 0 ? (by > 0 ? 0 : -1) : at + by;
    if (next < 0) return;
    if (next >= entries.length) more();
    const entry = list.children[next];
    if (entry) {
      entry.focus({preventScroll: true});
      entry.scrollIntoView({block: 'start'});
    }
  };

  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
      if (move[event.key]) {
        event.preventDefault();
        step(...move[event.key]);
      }
      return;
    }
    if (event.target.closest('input, select, textarea')) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    if (event.key === '/') {
      event.preventDefault();
      controls.search.focus();
    } else if (event.key === 'j') walk(1);
    else if (event.key === 'k') walk(-1);
  });

  byId('tools').addEventListener('input', changed);
  byId('reset').addEventListener('click', () => {
    for (const [name, control] of Object.entries(controls)) {
      if (control) control.value = defaults[name];
    }
    const chosen = usual.split('.');
    for (const box of boxes) box.checked = chosen.includes(box.value);
    changed();
  });
  window.addEventListener('hashchange', () => {
    readAddress();
    refresh();
  });
  readAddress();
  refresh();
})();
