// Stress of XCCL: every rank sends a stream to the next, asks all others, serves everybody, and checks
// each byte, with random delays at every step of the protocols.
//
//   xccl_stress threads|processes NUM_RANKS ROUNDS
//
// Threads share one mapping, which is what the thread sanitizer needs to see races; processes map the
// segments for themselves, as in production.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "asker.h"
#include "core.h"
#include "exchange.h"
#include "p2p.h"
#include "server.h"
#include "stress.h"
#include "window.h"

namespace xds::xccl {
namespace {

constexpr uint32_t kWidth = 24;

uint64_t message_bytes(uint32_t rank, uint64_t index) { return (index * 97 + rank * 31) % 1500; }
uint8_t message_byte(uint32_t rank, uint64_t index, uint64_t at) {
  return static_cast<uint8_t>(rank * 5 + index * 3 + at);
}

class Rank {
 public:
  Rank(const std::string& run, uint32_t rank, uint32_t num_ranks, uint64_t rounds)
      : run_(run),
        rank_(rank),
        num_ranks_(num_ranks),
        rounds_(rounds),
        core_(Segment::create(run, "r" + std::to_string(rank), rank, small_layout(num_ranks)),
              int64_t{20'000'000'000}),
        p2p_(core_, trace_),
        asker_(core_, trace_),
        server_(core_, trace_),
        window_(core_, trace_),
        exchange_(core_, asker_) {
    out_.resize(2000);
  }

  void run() {
    attach_all();
    const int64_t deadline = now_ns() + kLimitNs;
    bool told = false;
    while (load_acquire(*window_.own_word(0)) < num_ranks_) {
      const bool moved = step_stream() | step_serve() | step_ask();
      if (!told && sent_ == rounds_ && received_ == rounds_ && asked_ == rounds_ && !asking_) {
        told = true;
        for (uint32_t r = 0; r < num_ranks_; ++r) window_.add(r, 0, 1);
      }
      if (!moved) core_.wait([&] { return has_news(); }, now_ns() + 5'000'000,
                              [] { return std::span<const uint32_t>(); });
      require(now_ns() < deadline, "no progress before the time limit");
    }
    core_.own().unlink();
  }

 private:
  uint32_t next() const { return (rank_ + 1) % num_ranks_; }
  uint32_t previous() const { return (rank_ + num_ranks_ - 1) % num_ranks_; }

  void attach_all() {
    for (uint32_t r = 0; r < num_ranks_; ++r) {
      for (;;) {
        try {
          core_.attach(Segment::open(Segment::read_blob(run_, "r" + std::to_string(r))));
          break;
        } catch (const SegmentFault&) {
          usleep(500);  // not there yet
        }
      }
    }
  }

  bool has_news() {
    return server_.has_arrivals() || (asking_ && exchange_.collect()) ||
           load_acquire(*window_.own_word(0)) >= num_ranks_ || step_stream();
  }

  bool step_stream() {
    bool moved = false;
    if (sent_ < rounds_ && !p2p_.is_sending(next())) {
      message_.resize(message_bytes(rank_, sent_));
      for (uint64_t i = 0; i < message_.size(); ++i) message_[i] = message_byte(rank_, sent_, i);
      const auto tag = static_cast<uint32_t>(sent_);
      require(p2p_.begin_send(next(), message_.data(), message_.size(), tag) == Status::kOk, "send");
    }
    if (p2p_.is_sending(next()) && p2p_.push(next()) == Status::kOk) {
      ++sent_;
      moved = true;
    }
    if (received_ == rounds_) return moved;
    const Status status = p2p_.pull(previous(), out_.data(), out_.size(), receive_);
    if (status == Status::kPending) return moved;
    require(status == Status::kOk, "recv");
    require(receive_.tag == received_, "messages arrive in order");
    require(receive_.total == message_bytes(previous(), received_), "size of a message");
    for (uint64_t i = 0; i < receive_.total; ++i) {
      require(out_[i] == message_byte(previous(), received_, i), "byte of a message");
    }
    receive_ = {};
    ++received_;
    return true;
  }

  bool step_serve() {
    Incoming request;
    if (!server_.take(request)) return false;
    const Segment& theirs = *core_.peer(request.source_rank).segment;
    const auto* rows = reinterpret_cast<const float*>(theirs.base() + request.rows_offset);
    const uint32_t count = request.num_rows * kWidth;
    require(request.row_bytes == kWidth * 4, "width of a request");
    const Answer answer{.num_rows = request.num_rows, .row_bytes = request.row_bytes};
    uint64_t scales = 0, place = 0;
    const Status placed = server_.place(request.source_rank, request.source_incarnation,
                                        request.seq, answer, scales, place);
    require(placed == Status::kOk, "place of an answer");
    auto* out = reinterpret_cast<float*>(core_.own().base() + place);
    for (uint32_t i = 0; i < count; ++i) out[i] = rows[i] * 2.0f;
    require(server_.publish(request.source_rank, request.source_incarnation, request.seq,
                            answer) == Status::kOk,
            "answer");
    return true;
  }

  bool step_ask() {
    if (!asking_ && asked_ < rounds_) begin_ask();
    if (!asking_) return false;
    require(exchange_.post() != Status::kTooLarge, "post");
    if (!exchange_.collect()) return false;
    for (const Part& part : exchange_.parts()) {
      require(part.state == PartState::kAnswered, "an answer");
      require(part.reply->tag.step_idx == asked_, "an answer's tag");
      const Segment& theirs = *core_.peer(part.rank).segment;
      const auto* rows = reinterpret_cast<const float*>(
          theirs.base() + theirs.reply_offset(rank_, part.seq));
      for (uint32_t i = 0; i < part.num_rows * kWidth; ++i) {
        require(rows[i] == rows_[i] * 2.0f, "value of an answer");
      }
    }
    exchange_.release();
    asking_ = false;
    ++asked_;
    return true;
  }

  void begin_ask() {
    const auto num_rows = static_cast<uint32_t>(1 + asked_ % 7);
    rows_.resize(num_rows * kWidth);
    for (uint32_t i = 0; i < rows_.size(); ++i) {
      rows_[i] = static_cast<float>(rank_ * 1000 + asked_ * 10 + i);
    }
    exchange_.begin({.rows = reinterpret_cast<const uint8_t*>(rows_.data()),
                     .num_rows = num_rows,
                     .width = kWidth});
    const Tag tag{.step_idx = asked_, .epoch = 1};
    for (uint32_t r = 0; r < num_ranks_; ++r) {
      if (r != rank_ || asked_ % 5 == 0) exchange_.add_rows(r, tag, 0, {}, {}, num_rows);
    }
    asking_ = true;
  }

  std::string run_;
  uint32_t rank_, num_ranks_;
  uint64_t rounds_, sent_ = 0, received_ = 0, asked_ = 0;
  bool asking_ = false;
  Trace trace_;
  Core core_;
  P2p p2p_;
  Asker asker_;
  Server server_;
  Window window_;
  Exchange exchange_;
  RecvState receive_;
  std::vector<uint8_t> message_, out_;
  std::vector<float> rows_;
};

int run_threads(const std::string& run, uint32_t num_ranks, uint64_t rounds) {
  std::vector<std::unique_ptr<Rank>> ranks;  // outlive all threads: their segments are looked at
  for (uint32_t r = 0; r < num_ranks; ++r) {
    ranks.push_back(std::make_unique<Rank>(run, r, num_ranks, rounds));
  }
  std::vector<std::thread> threads;
  for (auto& rank : ranks) threads.emplace_back([&rank] { rank->run(); });
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int run_processes(const std::string& run, uint32_t num_ranks, uint64_t rounds) {
  for (uint32_t r = 0; r < num_ranks; ++r) {
    if (fork() != 0) continue;
    {
      Rank rank(run, r, num_ranks, rounds);
      rank.run();
    }
    std::_Exit(0);
  }
  int result = 0;
  for (uint32_t r = 0; r < num_ranks; ++r) {
    int status = 0;
    wait(&status);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) result = 1;
  }
  return result;
}

}  // namespace
}  // namespace xds::xccl

int main(int argc, char** argv) {
  using namespace xds::xccl;
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s threads|processes NUM_RANKS ROUNDS\n", argv[0]);
    return 2;
  }
  const std::string mode = argv[1];
  const auto num_ranks = static_cast<uint32_t>(std::atoi(argv[2]));
  const auto rounds = static_cast<uint64_t>(std::atoll(argv[3]));
  const std::string run = "stress" + std::to_string(getpid());
  armed_fault = kDelays;
  const int result = mode == "threads" ? run_threads(run, num_ranks, rounds)
                                       : run_processes(run, num_ranks, rounds);
  std::printf("%s: %u ranks, %llu rounds: %s\n", mode.c_str(), num_ranks,
              static_cast<unsigned long long>(rounds), result == 0 ? "ok" : "FAILED");
  return result;
}
