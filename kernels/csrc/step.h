// The decoder blocks of a model over some tokens: one call a step, one team of threads that meet at barriers.
#pragma once
#include "mixture.h"
#include "multiply.h"
#include "recurrence.h"
#include "numbers.h"

namespace {

thread_local Scratch step_scratch;       // of the leading thread: activations of all tokens, and their codes
thread_local Scratch attention_scratch;  // of each thread: scores

// [tokens, heads, head_dim], with room between.
struct Heads {
  float* first;
  int64_t token, head;  // how far they are apart

  float* at(int64_t t, int64_t h) const { return first + t * token + h * head; }
};

// What threads keep from one layer to the next that takes the same input.
struct Codes {
  Token token;
  Panels all;
  bool filled = false;
};

// Where tokens of a mixture go. A pair is a token and one of its experts; `order` has pairs by their experts, those of
// expert e from first[e] on, and `place` says where in it a pair is.
struct Routes {
  float *scores, *weights;  // [m, experts (+ 1)], [m, chosen]
  int32_t *chosen, *order, *place, *first;
  void* choice;             // of choice_bytes() a token
  float* seen;              // by the router: [m, hidden], if that is not what experts see
  float *between, *out;     // of pairs in this order: [pairs, 2 inner], [pairs, hidden]
  int64_t bytes;            // that all of these take
};

// Which of n columns, `width` at a time, are a thread's.
struct Own {
  int64_t first, last;
  Own(int64_t n, int64_t width, int thread, int count)
      : first(share(ceil_div(n, width), thread, count) * width),
        last(smaller(share(ceil_div(n, width), thread + 1, count) * width, n)) {}
};

// [tokens, features], with room between.
struct Rows {
  float* first;
  int64_t token;
};

struct Step {
  const Plan& plan;
  const Isa& isa;
  const Isa* (*find)(int32_t form, int32_t i);
  float* x;
  const float* per_layer;
  int64_t m;
  const Sequence* sequences;
  const int64_t *sequence, *position;
  const Between& f = *isa.between;
  float *in_first = nullptr, *attended = nullptr, *gate = nullptr, *up = nullptr, *y = nullptr, *z = nullptr;
  void *panels = nullptr, *routing = nullptr;
  int64_t in_width = 0, out_width = 0, key_dim = 0;  // of what all blocks' `in` give, of what their `out` take; of their keys
  int64_t widest = 0, routes_bytes = 0;              // of their MLPs and mixtures

  static void widen(int64_t& to, int64_t width) { to = to < width ? width : to; }

  void measure() {
    for (int64_t b = 0; b < plan.count; ++b) {
      const Block& block = plan.blocks[b];
      const HeadShape& h = block.heads;
      widen(widest, block.inner);
      widen(widest, plan.per_layer);
      if (const Recurrence* r = block.recurrence) {
        widen(in_width, r->value_heads ? (1 + gathers(*r)) * rule_width(*r) : 4 * r->channels);
      } else if (block.out.count) {
        widen(in_width, Attending(*this, block).width);
        widen(out_width, h.heads * h.value_dim);
        widen(key_dim, h.key_dim);
      }
      if (block.mixture) widen(routes_bytes, place_routes(*block.mixture, nullptr).bytes);
    }
  }

  // Activations and codes of all tokens lie one after the other.
  int64_t floats() const { return m * (in_width + out_width + 2 * widest + 2 * plan.hidden); }

  void place(void* memory) {
    in_first = static_cast<float*>(memory);
    attended = in_first + m * in_width;
    gate = attended + m * out_width;
    up = gate + m * widest;
    y = up + m * widest;
    z = y + m * plan.hidden;
    routing = reinterpret_cast<char*>(memory) + ceil_div(4 * floats(), 64) * 64;
    panels = reinterpret_cast<char*>(routing) + routes_bytes;
  }

  // What the `in` of a block with attention give, one after the other, and where heads are in it.
  struct Attending {
    Heads q, k, v, gate;
    Rows latents = {}, low_queries = {};
    int64_t turned_from = 0, width = 0;  // the first feature of a head that turns by position; floats of a token

    Attending(const Step& step, const Block& block) {
      const HeadShape& h = block.heads;
      const int64_t m = step.m, queries = h.heads * h.key_dim;
      float* at = step.in_first;
      const auto take = [&](int64_t token, int64_t head) {
        const Heads heads{at, token, head};
        at += at ? m * token : 0, width += token;
        return heads;
      };
      if (step.plan.by_head) {
        q = take(3 * queries, 3 * h.key_dim);
        k = {q.first + h.key_dim, q.token, q.head};
        v = {k.first + h.key_dim, q.token, q.head};
      } else if (const Latent* latent = block.latent) {
        turned_from = h.key_dim - 2 * step.plan.ropes[block.rope].half;
        q = take(queries, h.key_dim);
        latents = rows(take(latent->rank + h.key_dim - turned_from, 0));
        k = take(h.heads * (turned_from + h.value_dim), turned_from + h.value_dim);
        v = {k.first + turned_from, k.token, k.head};
        low_queries = rows(take(latent->query_rank, 0));
      } else {
        const int64_t parts = step.plan.query_gate == 1 ? 2 : 1;
        q = take(parts * queries, parts * h.key_dim);
        k = v = take(block.reads ? 0 : h.kv_heads * h.key_dim, h.key_dim);
        if (!block.keys_only) v = take(block.reads ? 0 : h.kv_heads * h.value_dim, h.value_dim);
        if (step.plan.query_gate == 1) gate = {q.first + h.key_dim, q.token, q.head};
        else if (step.plan.query_gate) gate = take(h.heads * h.value_dim, h.value_dim);
      }
    }

    static Rows rows(const Heads& heads) { return {heads.first, heads.token}; }
  };

  Call call(const PreparedWeight& layer, const float* from, float* to) const {
    return {layer, *find(layer.form, layer.isa), reinterpret_cast<const char*>(from), kFloat32, 4 * layer.k, nullptr,
            reinterpret_cast<char*>(to), kFloat32, 4 * layer.n};
  }

  template <class Visit>
  void each_layer(const Visit& visit) const {
    const auto all = [&](const Product& product) {
      for (int i = 0; i < product.count; ++i) visit(*product.layers[i]);
    };
    for (int64_t b = 0; b < plan.count; ++b) {
      const Block& block = plan.blocks[b];
      for (int i = 0; i < block.in_count; ++i) all(block.in[i]);
      for (int i = 0; i < block.gate_count; ++i) all(block.gate[i]);
      if (block.latent) all(block.latent->query), all(block.latent->expand);
      if (block.per_layer) all(block.per_layer->gate), all(block.per_layer->projection);
      if (block.out.count) all(block.out);
      all(block.down);
      if (block.mixture) visit(*block.mixture->first[0]), visit(*block.mixture->second[0]);  // all are alike
    }
  }

  // A row of a product's input, [k]; to: where it is made if it is not that row.
  const float* input(const Product& product, const float* from, float* to) const {
    const int64_t width = product.layers[0]->k;
    for (const Norm& norm : product.norms)
      if (norm.weight) {
        f.normalize(from, norm, width, to);
        from = to;
      }
    if (product.hadamard) {
      const float factor = 1 / __builtin_sqrtf(float(product.hadamard));
      isa.hadamard(from, kFloat32, width, product.hadamard, product.signs, factor, to);
      from = to;
    }
    return from;
  }

  // Whether codes made for one layer are those that another takes.
  static bool same_codes(const Call& a, const Call& b) {
    return a.padded == b.padded && a.limbs == b.limbs && a.activation_bits == b.activation_bits &&
           a.groups.size == b.groups.size && &a.isa == &b.isa;
  }

  // A thread's share of a layer's outputs, to [rows, n]. row(t, room): input t, made in `room` unless it is somewhere; again:
  // whether codes are made of it, and not those of the layer before taken. The caller waits before outputs are used.
  template <class Row>
  void multiply(const PreparedWeight& layer, int64_t rows, const Row& row, bool again, Codes& codes, float* to, int thread,
                int count) const {
    auto* room = static_cast<float*>(row_scratch.memory);
    char* rest = reinterpret_cast<char*>(room + ceil_div(layer.k, 16) * 16);
    const int64_t blocks = ceil_div(layer.n, kBlockRows), first = share(blocks, thread, count),
                  last = share(blocks, thread + 1, count);
    if (rows == 1) {
      const Call now = call(layer, again ? row(0, room) : nullptr, to);
      if (again) codes.token = make_token(now, rest);
      return now.isa.gemv(layer, first, last, codes.token, to, kFloat32);
    }
    const Call now = call(layer, nullptr, to);
    if (again) {
      if (codes.filled) barrier(count);
      codes.filled = true;
      codes.all = place_panels(now, rows, panels);
      fill_panels(now, codes.all, reinterpret_cast<int8_t*>(rest + scratch_bytes(rows, now.limbs, layer.group_size)), thread,
                  count, [&](int64_t t, int8_t* to, int32_t* sums) {
                    return now.quantize_token(reinterpret_cast<const char*>(row(t, room)), to, sums);
                  });
      barrier(count);
    }
    now.isa.gemm(layer, first, last, codes.all, rest, to, kFloat32);
  }

  // The same of a product: to[i] [m, n] for layer i. Rows of `from` are as wide as its input, or so much apart.
  void multiply(const Product& product, const float* from, float* const* to, int thread, int count, int64_t apart = 0) const {
    if (!apart && product.count) apart = product.layers[0]->k;
    Codes codes;
    for (int i = 0; i < product.count; ++i) {
      const PreparedWeight& layer = *product.layers[i];
      const bool again = i == 0 || !same_codes(call(*product.layers[i - 1], from, to[i]), call(layer, from, to[i]));
      multiply(layer, m, [&](int64_t t, float* room) { return input(product, from + t * apart, room); }, again, codes, to[i], thread,
               count);
    }
  }

  int64_t thread_bytes() const {
    int64_t most = 0;
    each_layer([&](const PreparedWeight& layer) {
      const Call now = call(layer, nullptr, nullptr);
      const int64_t scratch = scratch_bytes(m, now.limbs, layer.group_size);
      const int64_t bytes = (layer.k + 16) * 4 + scratch + now.row_bytes() + token_bytes(now);
      most = most < bytes ? bytes : most;
    });
    return most;
  }

  int64_t shared_panel_bytes() const {
    int64_t most = 0;
    each_layer([&](const PreparedWeight& layer) {
      const Call now = call(layer, nullptr, nullptr);
      const int64_t counts[] = {m, smaller(m, now.isa.table_limbs / now.limbs)};  // an expert's may become tables: larger
      for (int64_t rows : counts) {
        const int64_t bytes = panel_bytes(now, rows);
        most = most < bytes ? bytes : most;
      }
    });
    return most;
  }

  CachedHead cached(const Block& block, int64_t t, int64_t head) const {
    const Sequence& in = sequences[sequence[t]];
    const HeadShape& h = block.heads;
    const int64_t room = in.capacity, bytes = room * element_size(plan.cache_type), at = (block.cache.scales + head) * room;
    const bool scaled = plan.cache_type == kInt8;
    return {static_cast<char*>(in.keys) + (block.cache.keys + head * h.key_dim) * bytes,
            static_cast<char*>(in.values) + (block.cache.values + head * h.value_dim) * bytes, scaled ? in.key_scales + at : nullptr, scaled ? in.value_scales + at : nullptr};
  }

  void rotate(const Block& block, float* head, int64_t t) const {
    if (block.rope < 0) return;
    const Rope& rope = plan.ropes[block.rope];
    const int64_t at = position[t] * rope.half;
    f.rotate(rope.cosine + at, rope.sine + at, rope.half, plan.pairs, head);
  }

  // Norms and positions of heads, in place, whose features turn from so many on.
  void turn(const Block& block, const Norm& norm, float* head, int64_t from, int64_t t) const {
    const bool normed = norm.weight && !block.whole;
    if (normed && !block.turned) f.normalize(head, norm, block.heads.key_dim, head);
    rotate(block, head + from, t);
    if (normed && block.turned) f.normalize(head, norm, block.heads.key_dim, head);
  }

  void clip(float* head, int64_t dim) const {
    const float most = plan.clip;
    for (int64_t i = 0; most && i < dim; ++i) head[i] = head[i] > most ? most : head[i] < -most ? -most : head[i];
  }

  // Latents after their norm, in place and for the cache, the common part of keys turned, and what queries, keys and values they make.
  void expand(const Block& block, const Attending& a, int thread, int count) const {
    const Latent& latent = *block.latent;
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
      float* row = a.latents.first + t * a.latents.token;
      f.normalize(row, latent.norm, latent.rank, row);
      rotate(block, row + latent.rank, t);
      const Sequence& in = sequences[sequence[t]];
      const int64_t at = block.cache.latents * in.capacity + position[t] * latent.rank;
      if (!in.latents) continue;
      if (plan.cache_type == kFloat32) memcpy(static_cast<float*>(in.latents) + at, row, 4 * latent.rank);
      else
        for (int64_t i = 0; i < latent.rank; ++i) static_cast<uint16_t*>(in.latents)[at + i] = F16::round(row[i]);
    }
    float *queries = a.q.first, *both = a.k.first;
    if (latent.query.count)
      multiply(latent.query, a.low_queries.first, &queries, thread, count);  // whose codes are where the next's are to be
    barrier(count);
    multiply(latent.expand, a.latents.first, &both, thread, count, a.latents.token);
    barrier(count);
  }

  void attention(const Block& block, const Attending& places, int thread, int count) const {
    const HeadShape& h = block.heads;
    const Heads &q = places.q, &k = places.k, &v = places.v;
    const int64_t dim = h.key_dim, group = h.heads / h.kv_heads, from = places.turned_from;
    const int64_t all = block.reads ? h.heads : h.heads + h.kv_heads;  // that are turned
    const int64_t out_width = h.heads * h.value_dim;
    if (block.whole) {
      for (int64_t i = share(2 * m, thread, count); i < share(2 * m, thread + 1, count); ++i) {
        const Norm& norm = i < m ? block.query : block.key;
        const int64_t width = (i < m ? h.heads : h.kv_heads) * dim;
        float* row = i < m ? q.at(i, 0) : k.at(i - m, 0);
        if (norm.weight) f.normalize(row, norm, width, row);
      }
      barrier(count);
    }
    for (int64_t i = share(m * all, thread, count); i < share(m * all, thread + 1, count); ++i) {
      const int64_t t = i / all, head = i % all - h.heads;
      if (head < 0) {
        float* query = q.at(t, i % all);
        clip(query, dim);
        turn(block, block.query, query, from, t);
        const float scaling = plan.position_scales ? plan.scaling * plan.position_scales[position[t]] : plan.scaling;
        for (int64_t j = 0; j < dim; ++j) query[j] *= scaling;
      } else {
        float *key = k.at(t, head), *value = v.at(t, head);
        auto* whole = static_cast<float*>(attention_scratch.memory);
        clip(key, dim);
        clip(value, h.value_dim);
        if (block.value.weight) f.normalize(value, block.value, h.value_dim, whole), value = whole;
        if (block.latent) {
          memcpy(whole, key, 4 * from);
          memcpy(whole + from, places.latents.first + t * places.latents.token + block.latent->rank, 4 * (dim - from));
          key = whole;
        } else turn(block, block.key, key, from, t);
        f.store(plan.cache_type, cached(block, t, head), position[t], key, value, dim, h.value_dim);
      }
    }
    barrier(count);
    int64_t turn_of = 0;
    for (int64_t t = 0, end; t < m; t = end) {
      end = same_sequence(t);
      const int64_t queries = (end - t) * group;
      for (int64_t at = 0; at < queries; at += kTileQueries)
        for (int64_t head = 0; head < h.kv_heads; ++head) {
          if (turn_of++ % count != thread) continue;
          Query tile[kTileQueries];
          const int here = int(smaller(kTileQueries, queries - at));
          for (int i = 0; i < here; ++i) {
            const int64_t row = t + (at + i) / group, of = head * group + (at + i) % group, last = position[row] + 1;
            const int64_t seen = block.window && block.window < last ? block.window : last;
            const float* sink = block.sinks ? block.sinks + of : nullptr;
          tile[i] = {q.at(row, of), attended + row * out_width + of * h.value_dim, last - seen, last, sink};
          }
          f.attend(plan.cache_type, cached(block, t, head), tile, here, dim, h.value_dim, plan.cap,
                   static_cast<float*>(attention_scratch.memory));
          for (int i = 0; plan.query_gate && i < here; ++i) {
            const int64_t row = t + (at + i) / group, of = head * group + (at + i) % group;
            float* sigmoids = places.gate.at(row, of);
            f.apply_gate(kSigmoid, nullptr, sigmoids, tile[i].out, h.value_dim);
            memcpy(tile[i].out, sigmoids, 4 * h.value_dim);
          }
        }
    }
  }

  // The end of the tokens of t's sequence.
  int64_t same_sequence(int64_t t) const {
    int64_t end = t + 1;
    while (end < m && sequence[end] == sequence[t]) ++end;
    return end;
  }

  // A thread's channels of rows, `stride` apart, of all tokens.
  void convolve(const Recurrence& r, const Block& block, float* rows, int64_t stride, int thread, int count) const {
    const Own own(r.channels, kColumns, thread, count);
    for (int64_t t = 0, end; t < m; t = end) {
      end = same_sequence(t);
      float* window = sequences[sequence[t]].windows + block.state * (r.kernel - 1) * r.channels;
      f.convolve(r, window, rows + t * stride, stride, end - t, own.first, own.last);
    }
  }

  // visit(its state, head, token) for a thread's share of all sequences' heads, of each head token by token.
  template <class Visit>
  void each_state(const Recurrence& r, const Block& block, int thread, int count, const Visit& visit) const {
    const int64_t state = r.key_dim * r.value_dim;
    int64_t turn_of = 0;
    for (int64_t t = 0, end; t < m; t = end) {
      end = same_sequence(t);
      float* states = sequences[sequence[t]].states + block.state * r.value_heads * state;
      for (int64_t head = 0; head < r.value_heads; ++head) {
        if (turn_of++ % count != thread) continue;
        for (int64_t i = t; i < end; ++i) visit(states + head * state, head, i);
      }
    }
  }

  // From the parts b, c and x of rows to what `out` takes.
  void short_convolution(const Block& block, float* parts, float* to, int thread, int count) const {
    const Recurrence& r = *block.recurrence;
    const int64_t stride = 3 * r.channels;
    const Own own(r.channels, kColumns, thread, count);
    for (int64_t t = 0; t < m; ++t)
      for (int64_t c = own.first; c < own.last; ++c) parts[t * stride + c] *= parts[t * stride + 2 * r.channels + c];
    convolve(r, block, parts, stride, thread, count);
    for (int64_t t = 0; t < m; ++t)
      for (int64_t c = own.first; c < own.last; ++c)
        to[t * r.channels + c] = parts[t * stride + r.channels + c] * parts[t * stride + c];
  }

  static bool gathers(const Recurrence& r) { return r.parts == kByKeyHead || r.parts == kSixLayers; }

  static int64_t rule_width(const Recurrence& r) { return r.channels + r.value_heads * (r.value_dim + 2); }

  // Where the `in` of the gated delta rule write, and where their parts then lie: queries, keys and values, z and the rest.
  void place_rule(const Recurrence& r, float** in, float** parts) const {
    const int64_t keys = r.key_heads * r.key_dim, values = r.value_heads * r.value_dim;
    parts[0] = in[0] + (r.parts == kFourLayers ? 0 : m * rule_width(r));
    parts[1] = parts[0] + m * r.channels;
    parts[2] = parts[1] + m * values;
    parts[3] = parts[2] + m * r.value_heads;
    const int64_t widths[3][6] = {{r.channels, values, r.value_heads}, {r.channels + values}, {keys, keys, values, values, r.value_heads}};
    for (int i = 1; i < 6; ++i) in[i] = in[i - 1] + m * widths[r.parts][i - 1];
    if (r.parts == kSixLayers) parts[1] = in[3], parts[2] = in[4], parts[3] = in[5];
  }

  void gather(const Recurrence& r, float* const* in, float* const* parts, int thread, int count) const {
    const int64_t keys = r.key_heads * r.key_dim, values = r.value_heads * r.value_dim, group = r.value_heads / r.key_heads;
    const auto copy = [](float* to, const float*& from, int64_t n) {
      memcpy(to, from, 4 * n);
      from += n;
    };
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
      float* mixed = parts[0] + t * r.channels;
      const float *a = in[0] + t * (r.parts == kSixLayers ? keys : r.channels + values), *b = in[1] + t * keys, *c = in[2] + t * values;
      if (r.parts == kSixLayers) {
        copy(mixed, a, keys), copy(mixed + keys, b, keys), copy(mixed + 2 * keys, c, values);
        continue;
      }
      b = in[1] + t * 2 * r.value_heads;
      for (int64_t head = 0; head < r.key_heads; ++head) {
        const int64_t of = t * r.value_heads + head * group, width = group * r.value_dim;
        copy(mixed + head * r.key_dim, a, r.key_dim), copy(mixed + keys + head * r.key_dim, a, r.key_dim);
        copy(mixed + 2 * keys + head * width, a, width), copy(parts[1] + of * r.value_dim, a, width);
        copy(parts[2] + of, b, group), copy(parts[3] + of, b, group);
      }
    }
  }

  // From rows of gates, x, b and c, and steps to what `out` takes, which is where the gates were.
  void state_space(const Block& block, float* rows, int64_t stride, int thread, int count) const {
    const Recurrence& r = *block.recurrence;
    const int64_t values = r.value_heads * r.value_dim, keys = r.key_heads * r.key_dim;
    convolve(r, block, rows + values, stride, thread, count);
    barrier(count);
    each_state(r, block, thread, count, [&](float* state, int64_t head, int64_t i) {
      float *row = rows + i * stride, *x = row + values + head * r.value_dim;
      const float* b = row + 2 * values + head * r.key_heads / r.value_heads * r.key_dim;
      const float wanted = softplus(row[values + r.channels + head] + r.shift[head]);
      const float step = wanted < r.shortest ? r.shortest : wanted, decay = exponential(-r.speed[head] * step);
      f.scan(state, b + keys, b, x, decay, step, r.skip[head], r.key_dim, r.value_dim);
    });
    barrier(count);
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
      float* gates = rows + t * stride;
      f.apply_gate(kSilu, nullptr, gates, gates + values, values);
      for (int64_t i = 0; i < values; i += r.norm_size)
        f.normalize(gates + i, {r.norm.weight + i, nullptr, r.norm.eps, 0}, r.norm_size, gates + i);
    }
  }

  // From the parts of its input to what `out` takes, which is where the gates were.
  void recurrence(const Block& block, float* const* parts, int thread, int count) const {
    const Recurrence& r = *block.recurrence;
    float *mixed = parts[0], *z = parts[1], *beta = parts[2], *fading = parts[3];
    const int64_t keys = r.key_heads * r.key_dim, width = r.value_heads * r.value_dim;
    convolve(r, block, mixed, r.channels, thread, count);
    barrier(count);
    const int64_t heads = 2 * r.key_heads;
    for (int64_t i = share(m * heads, thread, count); i < share(m * heads, thread + 1, count); ++i) {
      const float factor = i % heads < r.key_heads ? 1 / __builtin_sqrtf(float(r.key_dim)) : 1;
      f.to_length(mixed + i / heads * r.channels + i % heads * r.key_dim, r.key_dim, factor);
    }
    barrier(count);
    each_state(r, block, thread, count, [&](float* state, int64_t head, int64_t i) {
      float* q = mixed + i * r.channels + head * r.key_heads / r.value_heads * r.key_dim;
      float *v = mixed + i * r.channels + 2 * keys + head * r.value_dim, *gate = z + i * width + head * r.value_dim;
      const int64_t at = i * r.value_heads + head;
      const float decay = exponential(-r.speed[head] * softplus(fading[at] + r.shift[head]));
      f.recur(state, q, q + keys, v, decay, sigmoid(beta[at]) * r.most, r.key_dim, r.value_dim);
      f.normalize(v, r.norm, r.value_dim, v);
      f.apply_gate(kSilu, nullptr, gate, v, r.value_dim);
    });
  }

  // x += from, after a norm of it if there is one. A thread has written its share of from's columns; all see x afterwards.
  void add(float* from, const Norm& norm, int thread, int count) const {
    if (norm.weight) {
      barrier(count);
      for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
        float* row = from + t * plan.hidden;
        f.normalize(row, norm, plan.hidden, row);
        for (int64_t i = 0; i < plan.hidden; ++i) x[t * plan.hidden + i] += row[i] * plan.residual;
      }
    } else {
      const Own own(plan.hidden, kBlockRows, thread, count);
      for (int64_t t = 0; t < m; ++t)
        for (int64_t i = t * plan.hidden + own.first; i < t * plan.hidden + own.last; ++i) x[i] += from[i] * plan.residual;
    }
    barrier(count);
  }

  void identity(const Block& block, int64_t b, int thread, int count) const {
    const PerLayer& adds = *block.per_layer;
    const int64_t width = plan.per_layer;
    float* to = gate;
    multiply(adds.gate, x, &to, thread, count);
    barrier(count);
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t)
      f.apply_gate(plan.gate, block.bend, gate + t * width, per_layer + (t * plan.count + b) * width, width);
    barrier(count);
    multiply(adds.projection, gate, &(to = y), thread, count);
    add(y, adds.after, thread, count);
  }

  Routes place_routes(const Mixture& mix, void* memory) const {
    const int64_t pairs = m * mix.chosen;
    Routes r = {};
    const auto take = [&](int64_t size) {
      void* at = memory ? static_cast<char*>(memory) + r.bytes : nullptr;
      r.bytes += ceil_div(size, 64) * 64;
      return at;
    };
    r.scores = static_cast<float*>(take(4 * m * (mix.experts + 1)));
    r.weights = static_cast<float*>(take(4 * pairs));
    r.chosen = static_cast<int32_t*>(take(4 * pairs));
    r.order = static_cast<int32_t*>(take(4 * pairs));
    r.place = static_cast<int32_t*>(take(4 * pairs));
    r.first = static_cast<int32_t*>(take(4 * (mix.experts + 1)));
    r.choice = take(m * choice_bytes(mix));
    r.seen = static_cast<float*>(take(mix.router_norm.weight ? 4 * m * plan.hidden : 0));
    r.between = static_cast<float*>(take(4 * pairs * 2 * mix.inner));
    r.out = static_cast<float*>(take(4 * pairs * plan.hidden));
    return r;
  }

  // Pairs by expert, in the order of tokens.
  void sort(const Mixture& mix, const Routes& r) const {
    memset(r.first, 0, 4 * (mix.experts + 1));
    for (int64_t i = 0; i < m * mix.chosen; ++i) ++r.first[r.chosen[i] + 1];
    for (int64_t e = 0; e < mix.experts; ++e) r.first[e + 1] += r.first[e];
    for (int64_t i = 0; i < m * mix.chosen; ++i) r.order[r.place[i] = r.first[r.chosen[i]]++] = int32_t(i);
    memmove(r.first + 1, r.first, 4 * mix.experts);
    r.first[0] = 0;
  }

  // y = the mixture of x, plus y if there is an MLP, whose outputs a thread has written its share of, as it does here.
  void mixture(const Block& block, int thread, int count) const {
    const Mixture& mix = *block.mixture;
    const Routes r = place_routes(mix, routing);
    const int64_t scores = mix.experts + mix.shared_gate, pairs = m * mix.chosen, parts = 1 + (plan.gated != 0);
    const float* seen = mix.router_norm.weight ? r.seen : z;  // by the router
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
      const int64_t at = t * plan.hidden;
      if (mix.router_norm.weight) f.normalize(x + at, mix.router_norm, plan.hidden, r.seen + at);
      if (mix.norm.weight) f.normalize(x + at, mix.norm, plan.hidden, z + at);
      else memcpy(z + at, x + at, 4 * plan.hidden);
    }
    barrier(count);
    for (int64_t i = share(m * scores, thread, count); i < share(m * scores, thread + 1, count); ++i) {
      const char* row = static_cast<const char*>(mix.router) + i % scores * plan.hidden * element_size(mix.router_type);
      r.scores[i] = f.score_row(row, mix.router_type, seen + i / scores * plan.hidden, plan.hidden);
      if (mix.bias) r.scores[i] += mix.bias[i % scores];
    }
    barrier(count);
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t)
      choose_experts(mix, r.scores + t * scores, r.chosen + t * mix.chosen, r.weights + t * mix.chosen,
                     static_cast<char*>(r.choice) + t * choice_bytes(mix));
    if (m > 1) barrier(count);
    if (thread == count - 1) sort(mix, r);  // whose share a single token is
    barrier(count);
    Codes codes;
    bool again = true;
    for (int64_t e = 0; e < mix.experts; ++e) {
      const int64_t at = r.first[e], rows = r.first[e + 1] - at;
      if (!rows) continue;
      const auto row = [&](int64_t i, float*) { return z + r.order[at + i] / mix.chosen * plan.hidden; };
      multiply(*mix.first[e], rows, row, again, codes, r.between + at * parts * mix.inner, thread, count);
      again = m > 1;
    }
    barrier(count);
    for (int64_t i = share(pairs, thread, count); i < share(pairs, thread + 1, count); ++i) {
      float* halves = r.between + i * parts * mix.inner;
      f.apply_gate(plan.gate, block.bend, halves, plan.gated ? halves + mix.inner : nullptr, mix.inner);
    }
    barrier(count);
    codes.filled = false;
    for (int64_t e = 0; e < mix.experts; ++e) {
      const int64_t at = r.first[e], rows = r.first[e + 1] - at;
      if (!rows) continue;
      const auto row = [&](int64_t i, float*) { return r.between + (at + i) * parts * mix.inner; };
      multiply(*mix.second[e], rows, row, true, codes, r.out + at * plan.hidden, thread, count);
    }
    const Own own(plan.hidden, kBlockRows, thread, count);
    for (int64_t t = 0; t < m; ++t) {
      const int32_t* place = r.place + t * mix.chosen;
      const float* weights = r.weights + t * mix.chosen;
      const float shared = mix.shared_gate ? sigmoid(r.scores[t * scores + mix.experts]) : 1;
      for (int64_t first = own.first; first < own.last; first += kBlockRows) {
        const int64_t columns = smaller(kBlockRows, own.last - first);
        float sum[kBlockRows] = {};
        for (int64_t j = 0; j < mix.chosen; ++j)
          for (int64_t i = 0; i < columns; ++i) sum[i] += r.out[place[j] * plan.hidden + first + i] * weights[j];
        float* to = (mix.after.weight ? z : y) + t * plan.hidden + first;
        if (mix.after.weight) memcpy(to, sum, 4 * columns);
        else
          for (int64_t i = 0; i < columns; ++i) to[i] = block.inner ? sum[i] + to[i] * shared : sum[i];
      }
    }
    if (!mix.after.weight) return;
    barrier(count);
    for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
      float *sum = z + t * plan.hidden, *to = y + t * plan.hidden;
      f.normalize(sum, mix.after, plan.hidden, sum);
      f.normalize(to, mix.beside, plan.hidden, to);
      for (int64_t i = 0; i < plan.hidden; ++i) to[i] += sum[i];
    }
    barrier(count);
  }

  void run(int64_t b, int thread, int count) const {
    const Block& block = plan.blocks[b];
    if (block.out.count) mixer(block, thread, count);
    if (block.inner || block.mixture) mlp(block, b, thread, count);
    if (block.scalar != 1) {
      for (int64_t i = share(m * plan.hidden, thread, count); i < share(m * plan.hidden, thread + 1, count); ++i) x[i] *= block.scalar;
      barrier(count);
    }
  }

  // What looks at other tokens. In a parallel block it is not added yet.
  void mixer(const Block& block, int thread, int count) const {
    float *in[6] = {in_first}, *parts[4] = {};
    const float* mixed = attended;
    const Recurrence* r = block.recurrence;
    const bool space = r && r->parts == kStateSpace, rule = r && r->value_heads && !space;
    const int64_t space_width = space ? r->channels + r->value_heads * (r->value_dim + 1) : 0;
    const Attending places(*this, block);
    if (block.latent) in[0] = block.latent->query.count ? places.low_queries.first : in_first, in[1] = places.latents.first;
    else if (!r) in[1] = places.k.first, in[2] = places.v.first, in[3] = places.gate.first;
    if (rule) place_rule(*r, in, parts), mixed = parts[1];
    else if (space) mixed = in[0];
    else if (r) mixed = in[1] = in[0] + m * 3 * r->channels;
    for (int i = 0, at = 0; i < block.in_count; at += int(block.in[i++].count)) {
      if (i) barrier(count);
      multiply(block.in[i], x, in + at, thread, count);
    }
    barrier(count);
    if (rule && gathers(*r)) {
      gather(*r, in, parts, thread, count);
      barrier(count);
    }
    if (block.latent) expand(block, places, thread, count);
    if (rule) recurrence(block, parts, thread, count);
    else if (space) state_space(block, in[0], space_width, thread, count);
    else if (r) short_convolution(block, in[0], in[1], thread, count);
    else attention(block, places, thread, count);
    barrier(count);
    multiply(block.out, mixed, &(in[0] = z), thread, count, space_width);
    if (block.parallel) barrier(count);
    else add(z, block.after_attention, thread, count);
  }

  void mlp(const Block& block, int64_t b, int thread, int count) const {
    float *gates[] = {gate, up}, *to = y;
    for (int i = 0, at = 0; i < block.gate_count; at += int(block.gate[i++].count)) {
      if (i) barrier(count);
      multiply(block.gate[i], x, gates + at, thread, count);
    }
    if (const int64_t inner = block.inner) {
      const Own own(inner, kBlockRows, thread, count);
      for (int64_t t = 0; t < m; ++t) {
        const int64_t at = t * inner + own.first;
        f.apply_gate(plan.gate, block.bend, gate + at, plan.gated ? up + at : nullptr, own.last - own.first);
      }
      barrier(count);
      multiply(block.down, gate, &to, thread, count);
    }
    if (block.mixture) mixture(block, thread, count);
    if (block.parallel) add(z, block.after_attention, thread, count);
    add(y, block.after_mlp, thread, count);
    if (block.per_layer) identity(block, b, thread, count);
  }

  Status run_all(int threads) {
    int64_t longest = 0;
    for (int64_t t = 0; t < m; ++t) longest = longest < position[t] + 1 ? position[t] + 1 : longest;
    measure();
    void* memory = step_scratch.reserve(ceil_div(4 * floats(), 64) * 64 + routes_bytes + shared_panel_bytes());
    if (!memory) return kNoMemory;
    place(memory);
    const int64_t bytes = thread_bytes(), scores = (longest + 32) * kTileQueries * 4 + key_dim * 4;
    Status status = kOk;
    bool alone = false;
    parallel(threads, [&](int thread, int count) {
      if (!row_scratch.reserve(bytes) || !attention_scratch.reserve(scores))
        __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
      barrier(count);
      if (__atomic_load_n(&status, __ATOMIC_RELAXED) != kOk) return;
      Watch watch;
      for (int64_t b = 0; b < plan.count; ++b) {
        run(b, thread, count);
        if (count == 1) continue;
        if (thread == 0) alone = watch.lost();
        barrier(count);
        if (alone && thread > 0) return;
        if (alone) count = 1;
      }
      for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
        float* row = x + t * plan.hidden;
        if (plan.final.weight) f.normalize(row, plan.final, plan.hidden, row);
      }
    });
    return status;
  }
};

}  // namespace
