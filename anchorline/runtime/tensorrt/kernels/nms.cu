// Greedy non-maximum suppression of G independent groups of N boxes, in falling order of score.
//
// boxes [G, N, 4] float32 xyxy, scores [G, N] float32, kept [G, N] float32: the score of an entry that
// survives, -1 for any other. An entry counts when its score is above the threshold and its box has a
// positive width and a finite positive area (NaN fails each of these); what does not count is skipped
// wherever it stands. A box goes when inter / union with a kept one is above the IoU threshold, in
// float32 with every operation rounded on its own: the _rn intrinsics are never fused.
//
// Up to NMS_SMALL boxes, nms_small does everything in shared memory. Above, nms_overlaps writes the
// overlap matrix as 64x64 tiles of bits, those on and above the diagonal only (fewer than N * N / 8
// bytes), and nms_select walks its rows, one block a group. Both stop after the last entry that counts.

typedef unsigned long long Word;  // 64 entries, the first in the lowest bit

#define NMS_TILE 64
#define NMS_SMALL 256
#define NMS_MAX_WORDS 128  // 8192 boxes
#define SUPPRESSED -1.0f
#define ALL_LANES 0xffffffffu

__device__ __forceinline__ float box_area(float4 box) {
  return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y));
}

__device__ __forceinline__ bool counts(float4 box, float score, float score_threshold) {
  const float area = box_area(box);
  return score > score_threshold && box.z > box.x && area > 0.0f && area <= 3.402823466e38f;
}

__device__ __forceinline__ bool overlaps(float4 a, float area_a, float4 b, float area_b, float iou_threshold) {
  const float width = __fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x));
  const float height = __fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y));
  const float inter = __fmul_rn(fmaxf(width, 0.0f), fmaxf(height, 0.0f));
  if (inter == 0.0f) return false;  // no threshold is below 0, and the division is the dear part
  return __fdiv_rn(inter, __fsub_rn(__fadd_rn(area_a, area_b), inter)) > iou_threshold;
}

// The first tile of a row of tiles; tile (row, column) stands at tile_row(row, words) + column - row.
__device__ __forceinline__ int tile_row(int row, int words) {
  return row * words - row * (row - 1) / 2;
}

// What survives of 64 entries: `overlap[i]` holds the entries that entry i suppresses.
__device__ __forceinline__ Word resolve(Word alive, const Word* overlap) {
  Word kept = 0;
  while (alive != 0) {
    const int first = __ffsll(static_cast<long long>(alive)) - 1;
    const Word bit = 1ull << first;
    kept |= bit;
    alive &= ~(overlap[first] | bit);
  }
  return kept;
}

// A block of 64 threads a tile, a thread a row of it. gridDim.x = words + 1 and gridDim.y = (words + 1) / 2:
// row y of the grid takes the tiles of row y of the triangle and then those of row words - 1 - y, so that
// no block of the grid lies below the diagonal.
extern "C" __global__ void __launch_bounds__(NMS_TILE)
    nms_overlaps(const float4* boxes, const float* scores, Word* tiles, int entries, float iou_threshold,
                 float score_threshold) {
  __shared__ float4 column_boxes[NMS_TILE];
  __shared__ float column_areas[NMS_TILE];
  __shared__ Word column_counts;
  const int words = (entries + NMS_TILE - 1) / NMS_TILE;
  int row = blockIdx.y;
  int column = row + blockIdx.x;
  if (column >= words) {
    row = words - 1 - row;
    column = blockIdx.x - 1;
    if (row == static_cast<int>(blockIdx.y)) return;  // an odd number of rows: the middle one is done
  }
  const size_t group = blockIdx.z;
  boxes += group * entries;
  scores += group * entries;
  const int t = threadIdx.x;

  if (t == 0) column_counts = 0;
  __syncthreads();
  const int j = column * NMS_TILE + t;
  bool column_entry = false;
  if (j < entries) {
    column_boxes[t] = boxes[j];
    column_areas[t] = box_area(column_boxes[t]);
    column_entry = counts(column_boxes[t], scores[j], score_threshold);
  }
  const unsigned int half = __ballot_sync(ALL_LANES, column_entry);
  if (t % 32 == 0) atomicOr(&column_counts, static_cast<Word>(half) << t);
  __syncthreads();
  if (column_counts == 0) return;  // nms_select does not read this tile

  const int i = row * NMS_TILE + t;
  float4 box = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  bool row_entry = false;
  if (i < entries) {
    box = boxes[i];
    row_entry = counts(box, scores[i], score_threshold);
  }
  if (!row_entry) return;  // nms_select reads no row of an entry that does not count
  Word todo = column_counts;
  if (row == column) todo &= ~((2ull << t) - 1);  // entries after this one
  const float area = box_area(box);
  Word found = 0;
  while (todo != 0) {
    const int other = __ffsll(static_cast<long long>(todo)) - 1;
    todo &= todo - 1;
    if (overlaps(box, area, column_boxes[other], column_areas[other], iou_threshold)) found |= 1ull << other;
  }
  const size_t tile_count = static_cast<size_t>(words) * (words + 1) / 2;
  tiles[(group * tile_count + tile_row(row, words) + column - row) * NMS_TILE + t] = found;
}

// A block a group, of 32 * k threads, at least 64.
extern "C" __global__ void __launch_bounds__(1024)
    nms_select(const float4* boxes, const float* scores, const Word* tiles, float* kept, int entries,
               float score_threshold) {
  __shared__ Word counting[NMS_MAX_WORDS];  // later what is kept
  __shared__ Word gone[NMS_MAX_WORDS];
  __shared__ Word diagonal[2][NMS_TILE];
  __shared__ Word row_kept;
  __shared__ int end;
  const int words = (entries + NMS_TILE - 1) / NMS_TILE;
  const size_t group = blockIdx.x;
  boxes += group * entries;
  scores += group * entries;
  kept += group * entries;
  tiles += group * (static_cast<size_t>(words) * (words + 1) / 2) * NMS_TILE;
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, warps = blockDim.x / 32;

  if (t == 0) end = 0;
  __syncthreads();
  for (int word = warp; word < words; word += warps) {
    Word found = 0;
    for (int half = 0; half < 2; ++half) {
      const int i = word * NMS_TILE + half * 32 + lane;
      const bool entry = i < entries && counts(boxes[i], scores[i], score_threshold);
      found |= static_cast<Word>(__ballot_sync(ALL_LANES, entry)) << (32 * half);
    }
    if (lane == 0) {
      counting[word] = found;
      gone[word] = 0;
      if (found != 0) atomicMax(&end, word + 1);
    }
  }
  if (t < NMS_TILE) diagonal[0][t] = tiles[t];  // entries that do not count are not written, and not used
  __syncthreads();

  for (int row = 0; row < end; ++row) {
    const Word* row_tiles = tiles + static_cast<size_t>(tile_row(row, words)) * NMS_TILE;
    if (t == 0) {
      row_kept = resolve(counting[row] & ~gone[row], diagonal[row % 2]);
      counting[row] = row_kept;
    } else if (warp == 1 && row + 1 < end) {  // meanwhile, the next row's tile on the diagonal
      const Word* next = tiles + static_cast<size_t>(tile_row(row + 1, words)) * NMS_TILE;
      diagonal[(row + 1) % 2][lane] = next[lane];
      diagonal[(row + 1) % 2][lane + 32] = next[lane + 32];
    }
    __syncthreads();
    for (int column = row + 1 + warp; column < end; column += warps) {
      const Word* tile = row_tiles + static_cast<size_t>(column - row) * NMS_TILE;
      Word suppressed = 0;
      if (counting[column] != 0) {  // otherwise the tile is not written
        if (row_kept >> lane & 1) suppressed = tile[lane];
        if (row_kept >> (lane + 32) & 1) suppressed |= tile[lane + 32];
      }
      for (int other = 16; other > 0; other /= 2) suppressed |= __shfl_xor_sync(ALL_LANES, suppressed, other);
      if (lane == 0) gone[column] |= suppressed;
    }
    __syncthreads();
  }

  for (int i = t; i < entries; i += blockDim.x) {
    const int word = i / NMS_TILE;
    const bool survives = word < end && (counting[word] >> (i % NMS_TILE) & 1);
    kept[i] = survives ? scores[i] : SUPPRESSED;
  }
}

// A block a group, a thread an entry: `entries` rounded up to whole tiles, at most NMS_SMALL.
extern "C" __global__ void __launch_bounds__(NMS_SMALL)
    nms_small(const float4* boxes, const float* scores, float* kept, int entries, float iou_threshold,
              float score_threshold) {
  __shared__ float4 all_boxes[NMS_SMALL];
  __shared__ float areas[NMS_SMALL];
  __shared__ Word counting[NMS_SMALL / NMS_TILE];
  __shared__ Word overlap[NMS_SMALL / NMS_TILE][NMS_SMALL];
  const size_t group = blockIdx.x;
  boxes += group * entries;
  scores += group * entries;
  kept += group * entries;
  const int t = threadIdx.x, own = t / NMS_TILE, words = (entries + NMS_TILE - 1) / NMS_TILE;

  if (t < NMS_SMALL / NMS_TILE) counting[t] = 0;
  __syncthreads();
  float score = SUPPRESSED;
  bool entry = false;
  if (t < entries) {
    score = scores[t];
    all_boxes[t] = boxes[t];
    areas[t] = box_area(all_boxes[t]);
    entry = counts(all_boxes[t], score, score_threshold);
  }
  const unsigned int half = __ballot_sync(ALL_LANES, entry);
  if (t % 32 == 0) atomicOr(&counting[own], static_cast<Word>(half) << (t % NMS_TILE));
  __syncthreads();

  for (int word = own; word < words; ++word) {
    Word todo = entry ? counting[word] : 0, found = 0;
    if (word == own) todo &= ~((2ull << (t % NMS_TILE)) - 1);
    while (todo != 0) {
      const int bit = __ffsll(static_cast<long long>(todo)) - 1, other = word * NMS_TILE + bit;
      todo &= todo - 1;
      if (overlaps(all_boxes[t], areas[t], all_boxes[other], areas[other], iou_threshold)) found |= 1ull << bit;
    }
    overlap[word][t] = found;
  }
  __syncthreads();

  if (t == 0) {
    for (int row = 0; row < words; ++row) {
      Word left = counting[row] = resolve(counting[row], &overlap[row][row * NMS_TILE]);
      while (left != 0) {
        const int i = row * NMS_TILE + __ffsll(static_cast<long long>(left)) - 1;
        left &= left - 1;
        for (int column = row + 1; column < words; ++column) counting[column] &= ~overlap[column][i];
      }
    }
  }
  __syncthreads();
  if (t < entries) kept[t] = (counting[own] >> (t % NMS_TILE) & 1) ? score : SUPPRESSED;
}
