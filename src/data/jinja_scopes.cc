#include "data/jinja_scopes.h"

#include <unordered_set>
#include <utility>

namespace detour::data::jinja {
namespace {

class Symbols {
 public:
  explicit Symbols(const Symbols* parent) : parent_(parent) {}

  void Parameter(int id) { Add(id); }
  void Load(int id) {
    if (!Knows(id)) Add(id);
  }
  void Store(int id) {
    if (names_.contains(id)) return;
    if (!in_branch_ && (parent_ == nullptr || !parent_->Knows(id))) missing_.push_back(id);
    Add(id);
  }
  std::vector<int> TakeMissing() { return std::move(missing_); }

  // What one branch mentions, the others do not know, but what comes after all of them does.
  template <typename Visit>
  void Branch(std::vector<int>* mentioned, Visit visit) {
    const bool was_in_branch = std::exchange(in_branch_, true);
    std::vector<int> outer = std::exchange(added_, {});
    visit();
    in_branch_ = was_in_branch;
    for (const int id : added_) names_.erase(id);
    mentioned->insert(mentioned->end(), added_.begin(), added_.end());
    added_ = std::move(outer);
  }
  void Join(const std::vector<int>& mentioned) {
    for (const int id : mentioned) Add(id);
  }

 private:
  bool Knows(int id) const {
    for (const Symbols* symbols = this; symbols != nullptr; symbols = symbols->parent_) {
      if (symbols->names_.contains(id)) return true;
    }
    return false;
  }
  void Add(int id) {
    if (names_.insert(id).second && in_branch_) added_.push_back(id);
  }

  const Symbols* parent_;
  std::unordered_set<int> names_;
  std::vector<int> missing_, added_;
  bool in_branch_ = false;
};

void Visit(const Expr* expr, Symbols* symbols) {
  if (expr == nullptr) return;
  if (expr->op == Op::kName) symbols->Load(expr->id);
  for (const ExprPtr& child : expr->children) Visit(child.get(), symbols);
  if (expr->args == nullptr) return;
  for (const ExprPtr& child : expr->args->positional) Visit(child.get(), symbols);
  for (const auto& [key, child] : expr->args->keywords) Visit(child.get(), symbols);
  Visit(expr->args->star.get(), symbols);
  Visit(expr->args->star_star.get(), symbols);
}

void Visit(const Target& target, Symbols* symbols, bool parameter) {
  if (!target.attribute.empty()) {
    symbols->Load(target.id);
  } else if (target.id < 0) {
    for (const Target& part : target.parts) Visit(part, symbols, parameter);
  } else if (parameter) {
    symbols->Parameter(target.id);
  } else {
    symbols->Store(target.id);
  }
}

class Resolver {
 public:
  explicit Resolver(Program* program) {
    for (size_t id = 0; id < program->variables.size(); ++id) {
      const std::string& name = program->variables[id];
      const int number = static_cast<int>(id);
      if (name == "loop") loop_ = number;
      if (name == "caller") caller_ = number;
      if (name == "kwargs") kwargs_ = number;
      if (name == "varargs") varargs_ = number;
    }
  }

  // A block's names are all known before the blocks in it are looked at.
  void Resolve(Body* body, Symbols* symbols, std::vector<int>* missing) {
    for (const StmtPtr& statement : *body) VisitStatement(*statement, symbols);
    Descend(body, symbols);
    *missing = symbols->TakeMissing();
  }

 private:
  // What a statement mentions in the block it stands in.
  void VisitStatement(const Stmt& statement, Symbols* symbols) {
    switch (statement.kind) {
      case StmtKind::kIf:
        return VisitIf(statement, symbols);
      case StmtKind::kFor:
        return Visit(statement.exprs[0].get(), symbols);
      case StmtKind::kSet:
        Visit(statement.exprs[0].get(), symbols);
        return Visit(statement.targets[0], symbols, false);
      case StmtKind::kSetBlock:
        return Visit(statement.targets[0], symbols, false);
      case StmtKind::kMacro:
        return symbols->Store(statement.macro->id);
      case StmtKind::kPrint:
      case StmtKind::kCall:
      case StmtKind::kFilter:
      case StmtKind::kWith:
        for (const ExprPtr& expr : statement.exprs) Visit(expr.get(), symbols);
        return;
      default:
        return;
    }
  }

  // The elifs are one branch, in which each body is one again.
  void VisitIf(const Stmt& statement, Symbols* symbols) {
    const auto visit_body = [&](const Branch& branch) {
      for (const StmtPtr& inner : branch.body) VisitStatement(*inner, symbols);
    };
    const std::vector<Branch>& branches = statement.branches;
    Visit(branches[0].condition.get(), symbols);
    std::vector<int> mentioned;
    symbols->Branch(&mentioned, [&] { visit_body(branches[0]); });
    symbols->Branch(&mentioned, [&] {
      for (size_t i = 1; i < branches.size() && branches[i].condition != nullptr; ++i) {
        Visit(branches[i].condition.get(), symbols);
        std::vector<int> inner;
        symbols->Branch(&inner, [&] { visit_body(branches[i]); });
        symbols->Join(inner);
      }
    });
    if (branches.size() > 1 && branches.back().condition == nullptr) {
      symbols->Branch(&mentioned, [&] { visit_body(branches.back()); });
    }
    symbols->Join(mentioned);
  }

  void Descend(Body* body, Symbols* symbols) {
    for (const StmtPtr& statement : *body) Descend(statement.get(), symbols);
  }

  void Descend(Stmt* statement, Symbols* symbols) {
    Symbols inner(symbols);
    switch (statement->kind) {
      case StmtKind::kIf:
        for (Branch& branch : statement->branches) Descend(&branch.body, symbols);
        return;
      case StmtKind::kFor:
        if (loop_ >= 0) inner.Parameter(loop_);
        Visit(statement->targets[0], &inner, true);
        Resolve(&statement->body, &inner, &statement->missing);
        for (Branch& branch : statement->branches) {
          Symbols otherwise(symbols);
          Resolve(&branch.body, &otherwise, &branch.missing);
        }
        return;
      case StmtKind::kMacro:
      case StmtKind::kCall:
        return ResolveMacro(statement->macro.get(), &inner);
      case StmtKind::kWith:
        for (const Target& target : statement->targets) Visit(target, &inner, true);
        [[fallthrough]];
      case StmtKind::kSetBlock:
      case StmtKind::kFilter:
      case StmtKind::kGeneration:
        return Resolve(&statement->body, &inner, &statement->missing);
      default:
        return;
    }
  }

  void ResolveMacro(MacroDef* macro, Symbols* symbols) {
    for (const auto& [name, id] : macro->parameters) symbols->Parameter(id);
    for (const ExprPtr& expr : macro->defaults) Visit(expr.get(), symbols);
    if (macro->uses_caller) symbols->Parameter(caller_);
    if (macro->uses_kwargs) symbols->Parameter(kwargs_);
    if (macro->uses_varargs) symbols->Parameter(varargs_);
    Resolve(&macro->body, symbols, &macro->missing);
  }

  int loop_ = -1, caller_ = -1, kwargs_ = -1, varargs_ = -1;
};

}  // namespace

void ResolveScopes(Program* program) {
  Symbols symbols(nullptr);
  Resolver(program).Resolve(&program->body, &symbols, &program->missing);
}

}  // namespace detour::data::jinja
